"""What the simulated devices meet: how uncertain their steps are, and how likely the LLM rejects a draft.

The form is U-HLM's (Oh et al., arXiv 2412.12687): beta rises linearly with u. The numbers are made up so that kinds of
devices differ: their own best thresholds are spread over 0.1 to 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from agent.learn.sample import Floats, Sample

_STEPS = (128, 513)  # that a device takes between two rounds


class Kind(NamedTuple):
    """E[beta | u] = `slope` u + `offset`, within [0, 1]; u has the distribution Beta(`p`, `q`)."""

    slope: float
    offset: float
    p: float
    q: float


KINDS = (
    Kind(0.8, -0.05, 1.2, 3.0),
    Kind(0.6, -0.02, 1.5, 2.5),
    Kind(1.0, -0.35, 1.0, 2.0),
    Kind(0.7, 0.12, 1.2, 4.0),
)


@dataclass(frozen=True, slots=True)
class Nature:
    """One device's truth, which it does not know. `steps`: how many it takes between two rounds."""

    kind: Kind
    steps: int

    @classmethod
    def draw(cls, random: np.random.Generator) -> Nature:
        kind = KINDS[random.integers(len(KINDS))]
        own = kind._replace(
            slope=kind.slope * float(np.exp(random.normal(0.0, 0.1))), offset=kind.offset + random.normal(0.0, 0.03)
        )
        return cls(own, int(random.integers(*_STEPS)))

    def optimum(self, price: float) -> float:
        """The threshold above which beta exceeds the price."""
        return float(np.clip((price - self.kind.offset) / self.kind.slope, 0.0, 1.0))

    def live(self, threshold: float, audit: float, random: np.random.Generator) -> tuple[Sample, Floats]:
        """The steps until the next round: those that were sent, and u of all."""
        u = random.beta(self.kind.p, self.kind.q, self.steps)
        propensity = np.where(u > threshold, 1.0, audit)
        (sent,) = np.nonzero(random.random(self.steps) < propensity)
        rejected = random.random(len(sent)) < self.kind.slope * u[sent] + self.kind.offset
        kept = np.diff(sent, prepend=-1) - 1
        least = np.full(len(sent), audit)
        return Sample.of(u[sent], rejected, propensity[sent], rejected, kept, least), u
