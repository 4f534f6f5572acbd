"""What a model makes of a text: it is fed token by token, and asked each time what comes next.

    loss(t) = -log p(token t | the tokens before it), nats       perplexity = exp(mean loss)

One token at a time, because that is how a device writes; a whole prompt in one pass is computed by other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from models.engine.base import Engine, Floats, Tokenizer

Halves = NDArray[np.float16]

BESIDE = 8
"""Passages that are read side by side, at most."""

_LEAST = -60_000.0  # log-odds that float16 can still hold
_BLOCK = 16  # rows whose distributions are in memory at once
_CHARACTERS = 32  # of a text, for each token that is wanted of it: more are never needed
_SURE = 1.96  # standard errors to either side that cover 95 %


@dataclass(frozen=True, slots=True)
class Reading:
    """Of the T tokens that were foretold, passage after passage: losses (T,), and the likeliest tokens (T,)."""

    losses: NDArray[np.float64]
    likeliest: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and where 95 % of its like would lie, every token taken as drawn by itself."""

    value: float
    low: float
    high: float


def read(engine: Engine, passages: Seq[Seq[int]], keep: BinaryIO | None) -> Reading:
    """Each passage has at least two tokens and fits the context. `keep` gets the T distributions (`distributions_at`).

    Raises OSError if they cannot be written."""
    rows = list(accumulate((len(tokens) - 1 for tokens in passages), initial=0))
    reading = Reading(np.zeros(rows[-1]), np.zeros(rows[-1], np.int64))
    beside = max(1, min(BESIDE, engine.context // max(map(len, passages))))
    for first in range(0, len(passages), beside):
        for n, at, logits in _side_by_side(engine, passages[first : first + beside]):
            row = rows[first + n] + at
            odds = logits - logits.max()
            token = passages[first + n][at + 1]
            reading.losses[row] = math.log(float(np.exp(odds, dtype=np.float64).sum())) - float(odds[token])
            reading.likeliest[row] = odds.argmax()
            if keep is not None:
                keep.seek(2 * row * len(odds))
                keep.write(np.maximum(odds, _LEAST).astype(np.float16).tobytes())
    return reading


def _side_by_side(engine: Engine, passages: Seq[Seq[int]]) -> Iterator[tuple[int, int, Floats]]:
    """Passage, position and logits (V,) after that position, which are valid until the next one is taken."""
    places = [engine.open(tokens, 0) for tokens in passages]
    for place in places:
        place.rewind(0)
    for at in range(max(map(len, passages)) - 1):
        reading = [n for n, tokens in enumerate(passages) if at + 1 < len(tokens)]
        steps = engine.forward([(places[n], [passages[n][at]]) for n in reading])
        for n, step in zip(reading, steps, strict=True):
            yield n, at, step.logits
    for place in places:
        place.close()


def distributions_at(path: Path, vocab: int) -> Halves:
    """(T, V) What `read` kept: log p up to a constant of the row, 0 for the likeliest. Float16 is finest where p is
    large, so the mean divergence of a text is right to 1e-4 nats."""
    return np.memmap(path, np.float16, "r").reshape(-1, vocab)


def divergences(first: Halves, second: Halves) -> NDArray[np.float64]:
    """(T,) KL(first || second) of each row of two (T, V), nats."""
    found = np.zeros(len(first))
    for at in range(0, len(first), _BLOCK):
        p, q = _normal(first[at : at + _BLOCK]), _normal(second[at : at + _BLOCK])
        found[at : at + _BLOCK] = (np.exp(p) * (p - q)).sum(axis=1)
    return found


def _normal(odds: Halves) -> NDArray[np.float64]:
    """Log-probabilities of the rows."""
    wide = odds.astype(np.float64)
    logs: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return logs


def mean(values: NDArray[np.float64], least: float = -math.inf, most: float = math.inf) -> Estimate:
    """Of two or more, none of which can be less than `least` or more than `most`."""
    value = float(values.mean())
    margin = _SURE * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(value, max(least, value - margin), min(most, value + margin))


def exp_mean(values: NDArray[np.float64]) -> Estimate:
    """Of losses: the perplexity. Of differences of losses: the ratio of perplexities."""
    one = mean(values)
    return Estimate(*(math.exp(min(edge, 700.0)) for edge in (one.value, one.low, one.high)))


def beginnings(texts: Seq[str], tokenizer: Tokenizer, tokens: int) -> list[list[int]]:
    """Up to `tokens` tokens of each text; of what has less than two, nothing can be foretold and it is left out."""
    read = (tokenizer.encode(text[: _CHARACTERS * tokens], start=True)[:tokens] for text in texts)
    return [passage for passage in read if len(passage) > 1]


def common_beginnings(texts: Seq[str], tokenizers: Seq[Tokenizer], tokens: int) -> list[str]:
    """The texts, each cut between words where no tokenizer needs more than `tokens` tokens for it."""
    return [_cut(text, tokenizers, tokens) for text in texts]


def _cut(text: str, tokenizers: Seq[Tokenizer], tokens: int) -> str:
    raw = text[: _CHARACTERS * tokens].encode()
    reach = [len(tokenizer.decode(tokenizer.encode(raw, start=True)[:tokens])) for tokenizer in tokenizers]
    if min(reach) >= len(raw):
        return raw.decode()
    begin = raw[: min(reach)].decode("utf-8", "ignore")
    return begin.rpartition(" ")[0] or begin
