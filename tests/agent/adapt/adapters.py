"""Adapters for tests: small, random, and for whichever model is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.adapter import Adapter, Factors, write

MODEL = "ab" * 32


def small(seed: int, model: str = MODEL, rank: int = 2, d: int = 16, scale: float = 0.01) -> Adapter:
    """Changes the queries of one layer of a model of width `d`."""
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal(shape).astype(np.float32) * scale for shape in ((rank, d), (d, rank)))
    return Adapter(model, "llama", 2.0 * rank, {"blk.0.attn_q": Factors(a, b)})


def small_file(folder: Path, seed: int, model: str = MODEL) -> Path:
    path = folder / f"adapter-{seed}.gguf"
    write(small(seed, model), path)
    return path
