"""Between two tokenizers: the LLM's continuations, as bytes, to the SLM's tokens.

A continuation maps to the first SLM token along it. What has no counterpart is left out, the rest renormalised, and
the amount reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.engine.base import Tokenizer


def first_token(tokenizer: Tokenizer, text: bytes) -> int | None:
    """The first SLM token along `text`; b"" is the end of the answer. None if nothing fits."""
    if not text:
        return tokenizer.end_id if tokenizer.end_id >= 0 else None
    tokens = tokenizer.encode(text)
    return tokens[0] if tokens else None


def continuation(tokenizer: Tokenizer, text: bytes, *, ended: bool) -> list[int]:
    """The SLM's tokens along a growing `text`; the last one is left out while it may still grow."""
    tokens = tokenizer.encode(text)
    if ended:
        return [*tokens, tokenizer.end_id]
    return tokens[:1] if len(tokens) < 2 else tokens[:-1]


def distribution(
    tokenizer: Tokenizer, pieces: Sequence[bytes], p: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.float32], float]:
    """The LLM's likeliest pieces with probabilities p (n,) as SLM tokens (m,), their probabilities (m,), and the mass
    that matched nothing. The matched ones keep the sum of all."""
    mass: dict[int, float] = {}
    unmatched = 0.0
    for piece, share in zip(pieces, p.tolist(), strict=True):
        token = first_token(tokenizer, piece)
        if token is None:
            unmatched += share
        else:
            mass[token] = mass.get(token, 0.0) + share
    scale = float(p.sum()) / max(1e-9, float(p.sum()) - unmatched) if mass else 0.0
    ids = np.fromiter(mass, np.intp, len(mass))
    return ids, np.fromiter(mass.values(), np.float32, len(mass)) * np.float32(scale), unmatched
