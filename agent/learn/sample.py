"""What a device has seen: its sent steps, whose beta it knows, and how uncertain all its steps were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

MOST_WEIGHT = 20.0  # see Sample.weights
BINS = 64
HALF_LIFE = 20_000.0  # steps


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """n sent steps (escalations, audits) that the LLM answered, oldest first; float64 arrays (n,) unless said.

    `beta`: rejection probability. `propensity`: with which the step was going to be sent, > 0. `differs` (bool): the
    LLM's own token is not the draft. `kept` (int64): steps that were not sent, between the one before and this one.
    `least`: the least propensity that any step had since the one before, this one included; 0 where nothing below the
    threshold was audited. Only with it does it mean something that nothing was seen to differ.
    """

    u: Floats
    beta: Floats
    propensity: Floats
    differs: NDArray[np.bool_]
    kept: NDArray[np.int64]
    least: Floats

    @classmethod
    def of(
        cls,
        u: ArrayLike,
        beta: ArrayLike,
        propensity: ArrayLike,
        differs: ArrayLike,
        kept: ArrayLike,
        least: ArrayLike,
    ) -> Sample:
        """From anything of one length. Raises ValueError for lengths that differ."""
        columns = [np.asarray(column, np.float64) for column in (u, beta, propensity, least)]
        whole = cls(
            columns[0], columns[1], columns[2], np.asarray(differs, np.bool_), np.asarray(kept, np.int64), columns[3]
        )
        if any(column.shape != (len(whole),) for column in (*columns, whole.differs, whole.kept)):
            raise ValueError("the columns of a sample have one length")
        return whole

    @classmethod
    def empty(cls) -> Sample:
        return cls.of([], [], [], [], [], [])

    @classmethod
    def join(cls, samples: Sequence[Sample]) -> Sample:
        """One after the other, as they were seen."""
        if not samples:
            return cls.empty()
        return cls.of(*(np.concatenate([getattr(one, name) for one in samples]) for name in cls.__slots__))

    def __len__(self) -> int:
        return len(self.u)

    @property
    def steps(self) -> int:
        """Sent or not."""
        return len(self) + int(self.kept.sum())

    def weights(self, most: float = MOST_WEIGHT) -> Floats:
        """How many steps each stands for, 1 / propensity (Horvitz and Thompson, 1952), at most `most`.

        The cap trades bias for variance: audits at a rate below 1 / `most` count for less than they stand for, by the
        factor rate * `most`. Since propensity depends on u alone, that weighs the two sides of a threshold against
        each other and not the betas of one u, so what is learned shifts by less than the kernel's width: with audits
        of 2 % and a cap of 20 by -0.005, with no weights at all by -0.035 (agent/learn/losses.py, KAPPA).
        """
        return np.minimum(1.0 / np.maximum(self.propensity, 1e-12), most)


@dataclass(frozen=True, slots=True)
class Own:
    """What a device knows by itself. `evidence`: how many steps that rests on (Kish's effective number)."""

    threshold: float
    evidence: float


class Histogram:
    """Of u over all steps, sent or not: 64 equal bins of [0, 1]. A step counts half after `half_life` more."""

    def __init__(self, counts: Floats | None = None, half_life: float = HALF_LIFE) -> None:
        self.counts = np.zeros(BINS) if counts is None else np.array(counts, np.float64)
        self.half_life = half_life

    def add(self, u: ArrayLike) -> None:
        """(n,) values in order; those of one call fade together."""
        values = np.asarray(u, np.float64).reshape(-1)
        places = np.clip((values * BINS).astype(np.int64), 0, BINS - 1)
        self.counts *= 0.5 ** (len(values) / self.half_life)
        self.counts += np.bincount(places, minlength=BINS)

    @property
    def total(self) -> float:
        """Steps, as they count by now."""
        return float(self.counts.sum())

    @property
    def mean(self) -> float:
        """0 without steps."""
        centres = (np.arange(BINS) + 0.5) / BINS
        return float((self.counts * centres).sum() / self.total) if self.total else 0.0

    def above(self, threshold: float) -> float:
        """Share of steps with u > threshold, as if they lay evenly within a bin. 0 without steps."""
        below = np.interp(threshold, self._edges(), self._heights())
        return float(1.0 - below / self.total) if self.total else 0.0

    def quantile(self, share: float) -> float:
        """The u that `share` of the steps do not exceed. 0 without steps."""
        if not self.total:
            return 0.0
        heights = self._heights()
        wanted = min(max(share, 0.0), 1.0) * heights[-1]
        at = min(int(np.searchsorted(heights, wanted, side="left")), BINS)
        if at == 0:
            return 0.0
        within = (wanted - heights[at - 1]) / (heights[at] - heights[at - 1])
        return float((at - 1 + within) / BINS)

    def _edges(self) -> Floats:
        return np.arange(BINS + 1) / BINS

    def _heights(self) -> Floats:
        """(BINS + 1,) Steps below each edge."""
        return np.concatenate([[0.0], np.cumsum(self.counts)])
