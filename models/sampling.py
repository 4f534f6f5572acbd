"""From logits to a token: softmax, top-k, and the distribution that sampling parameters make of them.

Shared by the device and by the cloud resolver, which must shape x and y alike. Arrays are float32; V is the
vocabulary. Nothing here keeps a state: randomness comes in as one uniform number per decision (`uniform`), so that a
rewound step that is taken again draws the same number, and the same seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.resolve import Sampling

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

LEAST_TEMPERATURE = 1e-3  # below it a division by it overflows float32, and the result is greedy anyway
PENALTY_WINDOW = 64  # tokens that the repetition penalty looks back on, llama.cpp's default
FLOOR = np.float32(-80.0)  # e^-80 is nothing in float32, and 0 * -inf would be NaN
_MASK = (1 << 64) - 1
_ONE = np.ones(1, np.float32)
_WIDTHS = (np.float32(8.0), np.float32(16.0))  # nats below the likeliest token; 8 leaves hundreds as a rule


class Shaped(NamedTuple):
    """A sampling distribution: p (n,) sums to 1 over `ids` (n,), largest first; ids None: p is dense, (V,)."""

    ids: Ids | None
    p: Floats

    def at(self, token: int) -> float:
        """The probability of `token`."""
        if self.ids is None:
            return float(self.p[token])
        where = np.flatnonzero(self.ids == token)
        return float(self.p[where[0]]) if len(where) else 0.0

    def draw_at(self, seed: int, position: int) -> int:
        """The token that this seed draws at this position."""
        if len(self.p) == 1 and self.ids is not None:
            return int(self.ids[0])
        return self.draw(uniform(seed, position))

    def draw(self, r: float) -> int:
        """The token at quantile r in [0, 1) of the cumulative distribution."""
        cumulative = np.cumsum(self.p, dtype=np.float64)
        index = int(np.searchsorted(cumulative, r * cumulative[-1], side="right"))
        index = min(index, len(self.p) - 1)
        return index if self.ids is None else int(self.ids[index])


def shifted(logits: Floats, out: Floats | None = None) -> Floats:
    """logits - max(logits), floored at -80, (V,). -inf is allowed; +inf takes all the mass; NaN is an error."""
    top = logits.max()
    if not np.isfinite(top):
        return _infinite(logits, top)
    z: Floats = np.subtract(logits, top, out=out)
    return np.maximum(z, FLOOR, out=z)


def _infinite(logits: Floats, top: np.float32) -> Floats:
    if np.isnan(top) or top < 0:
        raise ValueError("the model gave logits that are NaN or all -inf")
    return np.where(np.isposinf(logits), np.float32(0), FLOOR).astype(np.float32)


def softmax(logits: Floats) -> Floats:
    """(V,) probabilities."""
    e = np.exp(shifted(logits))
    e /= e.sum()
    return e


def log_softmax(logits: Floats) -> Floats:
    """(V,) log-probabilities, finite."""
    z = shifted(logits)
    z -= np.float32(np.log(np.exp(z).sum()))
    return z


def top_ids(values: Floats, k: int, peak: float | None = None) -> Ids:
    """Indices of the k largest values, largest first, the lower index first among equals. `peak`: the largest value,
    if it is known."""
    n = len(values)
    if k >= n:
        return np.argsort(-values, kind="stable")
    top = values.max() if peak is None else np.float32(peak)
    # A cut that leaves a few hundred candidates is far cheaper than partitioning the whole vocabulary.
    for width in _WIDTHS:
        candidates = np.flatnonzero(values > top - width)
        if len(candidates) >= k:
            break
    if not k <= len(candidates) <= n // 4:
        # argpartition breaks ties arbitrarily, so everything equal to the k-th value is a candidate.
        kth = np.partition(values, n - k)[n - k]
        candidates = np.flatnonzero(values >= kth)
    order = np.argsort(-values[candidates], kind="stable")[:k]
    return candidates[order]


def shape(logits: Floats, sampling: Sampling, recent: Sequence[int] = (), likeliest: int = -1) -> Shaped:
    """What `sampling` makes of `logits` (V,), given the tokens so far; `likeliest` saves a pass where it is known."""
    if sampling.repetition_penalty != 1.0 and recent:
        logits = _penalised(logits, sampling.repetition_penalty, recent[-PENALTY_WINDOW:])
        likeliest = -1
    if likeliest < 0:
        likeliest = int(logits.argmax())
    if not sampling.temperature >= LEAST_TEMPERATURE:
        return Shaped(np.array([likeliest]), _ONE)
    if not np.isfinite(logits[likeliest]):
        logits = shifted(logits)
    if sampling.top_k <= 0 and sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        return Shaped(None, softmax(logits / np.float32(sampling.temperature)))
    ids = top_ids(logits, sampling.top_k if sampling.top_k > 0 else len(logits), float(logits[likeliest]))
    return _cut(ids, logits[ids] - logits[likeliest], sampling)


def _cut(ids: Ids, z: Floats, sampling: Sampling) -> Shaped:
    """top_p, min_p and temperature on candidates: z (n,) are their logits less the largest, largest first."""
    keep = len(ids)
    e = np.exp(z)
    if sampling.top_p < 1.0:
        mass = np.cumsum(e)
        keep = int(np.searchsorted(mass, np.float32(sampling.top_p) * mass[-1])) + 1
    if sampling.min_p > 0.0:
        keep = min(keep, int(np.count_nonzero(e >= np.float32(sampling.min_p))))
    keep = max(1, min(keep, len(ids)))
    p = np.exp(z[:keep] / np.float32(sampling.temperature))
    p /= np.add.reduce(p)
    return Shaped(ids[:keep], p)


def _penalised(logits: Floats, penalty: float, recent: Sequence[int]) -> Floats:
    """CTRL's repetition penalty (Keskar et al., 2019, section 4.1), as in llama.cpp: positive logits divided by it,
    negative ones multiplied."""
    seen = np.unique(np.asarray(recent, np.intp))
    out = logits.copy()
    values = out[seen]
    out[seen] = np.where(values > 0, values / penalty, values * penalty)
    return out


def uniform(seed: int, position: int, purpose: int = 0) -> float:
    """A uniform number in [0, 1) that depends on nothing but its arguments (SplitMix64, Steele et al., 2014).

    `purpose` tells apart the decisions of one position.
    """
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + purpose * 0x94D049BB133111EB) & _MASK
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / (1 << 53)
