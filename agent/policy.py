"""Keep, escalate or audit: the decision at each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import NamedTuple

from models.sampling import uniform

_AUDIT = 4  # tells the audit's random number from the others of one position (models.sampling.uniform)


class Why(StrEnum):
    KEEP = "keep"
    ESCALATE = "escalate"
    AUDIT = "audit"


class Decision(NamedTuple):
    """For unbiased learning. `propensity`: the probability with which this step was going to be sent; `least`: the
    least with which any step was, however sure the SLM is."""

    why: Why
    propensity: float
    least: float


class Policy(ABC):
    """MUST be a pure function of its arguments between two updates of what was learned, so that a step that is taken
    again after a rewind is decided alike."""

    threshold: float

    @abstractmethod
    def decide(self, u: float, seed: int, position: int) -> Decision: ...


class ThresholdPolicy(Policy):
    """Escalates when u > threshold, and always at threshold 0; audits a share of the other steps, chosen at random.
    Whoever learns (agent/learn/learner.py) sets `threshold`."""

    def __init__(self, threshold: float, audit: float = 0.0) -> None:
        self.threshold = threshold
        self.audit = audit

    def decide(self, u: float, seed: int, position: int) -> Decision:
        threshold, audit = self.threshold, self.audit  # once: whoever learns does so on another thread
        if threshold <= 0.0:
            return Decision(Why.ESCALATE, 1.0, 1.0)
        if u > threshold:
            return Decision(Why.ESCALATE, 1.0, audit)
        if audit > 0.0 and uniform(seed, position, _AUDIT) < audit:
            return Decision(Why.AUDIT, audit, audit)
        return Decision(Why.KEEP, audit, audit)
