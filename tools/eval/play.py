"""A fleet's stream, round by round: what is asked and audited, what the devices see of it, and what they learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.learn.sample import Histogram, Sample
from tools.eval.decisions import Decisions
from tools.eval.fleets import Fleet, Pool, Rows

Bools = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(slots=True)
class Seen:
    """What one device has seen of its stream. `rows`: the steps that the LLM answered, with the `propensity` with which
    they were going to be sent, and how many steps before each were `kept`. `all_rows`: sent or not."""

    rows: Rows = field(default_factory=lambda: np.empty(0, np.intp))
    propensity: Numbers = field(default_factory=lambda: np.empty(0))
    kept: Rows = field(default_factory=lambda: np.empty(0, np.intp))
    all_rows: Rows = field(default_factory=lambda: np.empty(0, np.intp))

    def note(self, rows: Rows, sent: Bools, propensity: Numbers) -> None:
        """The device's next steps, in order."""
        at = np.flatnonzero(sent)
        self.kept = np.concatenate([self.kept, np.diff(at, prepend=-1) - 1])
        self.rows = np.concatenate([self.rows, rows[at]])
        self.propensity = np.concatenate([self.propensity, propensity[at]])
        self.all_rows = np.concatenate([self.all_rows, rows])

    def sample(self, data: Decisions, audit: float, u: NDArray[np.float32] | None = None) -> Sample:
        """`u`: another measure of uncertainty than the data's own."""
        rows = self.rows
        measure = data.u if u is None else u
        least = np.minimum(self.propensity, audit)
        return Sample.of(measure[rows], data.beta[rows], self.propensity, data.differs[rows], self.kept, least)

    def histogram(self, data: Decisions) -> Histogram:
        seen = Histogram()
        seen.add(data.u[self.all_rows])
        return seen


class Policy(ABC):
    """Decides about steps, and learns after each round. `audit`: share of the other steps that is sent all the same.
    `learning_bytes`: (up, down) of the messages of its rounds, all devices together; `peer_bytes`: of what devices say
    to each other."""

    audit: float = 0.0

    def __init__(self) -> None:
        self.learning_bytes = [0, 0]
        self.peer_bytes = 0

    @abstractmethod
    def ask(self, rows: Rows) -> Bools:
        """(k,) Which of the steps are escalated."""

    @abstractmethod
    def learn(self, at: int, seen: Sequence[Seen]) -> None:
        """After round `at`, from what each device has seen so far."""

    def resolve(self, rows: Rows) -> tuple[Rows, Numbers]:
        """(k,), (k,) What is written at these escalated steps without the LLM, -1: nothing; and with what probability
        each was going to reach the LLM."""
        return np.full(len(rows), -1), np.ones(len(rows))

    def right(self, rows: Rows, written: Rows) -> Bools:
        """Of what `resolve` wrote."""
        raise NotImplementedError

    def agree(self, rows: Rows, written: Rows) -> Bools:
        """Is that what the LLM would have said?"""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Streamed:
    """`asked`, `audits` (n,): the steps of the stream that went to the LLM, as escalations and as audits; `written`
    (n,): what was written without it at escalated steps, or -1. `fresh` (rounds, m): the fresh steps that the policy
    would escalate after each round."""

    asked: Bools
    audits: Bools
    written: Rows
    fresh: Bools


def play(steps: Pool, drawn: Fleet, policy: Policy, seed: int) -> Streamed:
    n = len(steps.kind)
    asked, audits, written = np.zeros(n, bool), np.zeros(n, bool), np.full(n, -1)
    seen = [Seen() for _ in range(drawn.devices)]
    rng = np.random.default_rng(seed)
    fresh = []
    for at, rows in enumerate(drawn.stream):
        escalated = policy.ask(rows)
        propensity = np.full(len(rows), policy.audit)
        written[rows[escalated]], propensity[escalated] = policy.resolve(rows[escalated])
        asked[rows] = escalated & (written[rows] < 0)
        audits[rows] = ~escalated & (rng.random(len(rows)) < policy.audit)
        sent = (asked | audits)[rows]
        for device, own in enumerate(seen):
            mine = drawn.device[rows] == device
            own.note(rows[mine], sent[mine], propensity[mine])
        policy.learn(at, seen)
        fresh.append(policy.ask(drawn.fresh))
    return Streamed(asked, audits, written, np.stack(fresh))
