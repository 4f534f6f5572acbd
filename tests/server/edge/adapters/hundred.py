"""Aggregates 100 adapters of rank 8 to 32 for SmolLM2-135M, and prints seconds and peak memory as JSON.

    python -m tests.server.edge.adapters.hundred [--all] [--devices 100] [--strategy flexlora]

`--all`: all seven matrices of a layer, not q and v alone. From the root of the repository. With OPENBLAS_NUM_THREADS=1
on a machine that has other work: threads that wait for each other take many times as long.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from models.adapter import Adapter, Factors, read, write
from models.rss import rss
from server.edge.adapters import Contribution, aggregate, groups, screen

LAYERS, RANKS, ALPHA = 30, (8, 16, 24, 32), 16.0
MATRICES = {
    "attn_q": (576, 576),
    "attn_v": (192, 576),
    "attn_k": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}
MODEL = "5" * 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--strategy", default="flexlora")
    options = parser.parse_args()
    shapes = {
        f"blk.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in list(MATRICES.items())[: 7 if options.all else 2]
    }
    with tempfile.TemporaryDirectory() as folder:
        contributions = uploads(Path(folder), shapes, options.devices)
        before, took = rss(peak=True), {}
        start = time.perf_counter()
        accepted, refused = screen(contributions, MODEL, "llama", options.strategy)
        took["screen_s"] = time.perf_counter() - start
        start = time.perf_counter()
        found = groups(accepted)
        took["groups_s"] = time.perf_counter() - start
        start = time.perf_counter()
        made = aggregate(accepted, options.strategy, RANKS, ALPHA)
        took["aggregate_s"] = time.perf_counter() - start
    assert not refused
    assert len(made) == len(RANKS)
    sizes = {
        "rss_before_mb": before / 1e6,
        "rss_mb": rss(peak=True) / 1e6,
        "groups": len(found),
        "matrices": len(shapes),
    }
    print(json.dumps({name: round(value, 2) for name, value in (took | sizes).items()}))


def uploads(folder: Path, shapes: dict[str, tuple[int, int]], devices: int) -> list[Contribution]:
    """Files of random adapters."""
    random = np.random.default_rng(0)
    contributions = []
    for device in range(devices):
        rank = RANKS[device % len(RANKS)]
        factors = {
            name: Factors(
                random.standard_normal((rank, d_in), np.float32) / 24, random.standard_normal((d_out, rank), np.float32)
            )
            for name, (d_out, d_in) in shapes.items()
        }
        path = folder / f"{device}.gguf"
        write(Adapter(MODEL, "llama", ALPHA, factors), path)
        contributions.append(Contribution(f"device-{device:03}", 1.0 + device % 7, partial(read, path)))
    return contributions


if __name__ == "__main__":
    main()
