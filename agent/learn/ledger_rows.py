"""What the ledger keeps of a step, and how a sample is made of it. No text and no tokens: how sure the SLM was, who
answered, and whether the LLM agreed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from agent.learn.sample import Floats, Sample


class Outcome(StrEnum):
    """Of a step that was to be sent. Agreed, differed: the LLM wrote the draft, or another token. Fallback: nobody
    answered in time."""

    AGREED = "agreed"
    DIFFERED = "differed"
    MEMORY = "memory"
    PEER = "peer"
    FALLBACK = "fallback"


class Features(NamedTuple):
    """What else was known of the step, None where it was not. `p`: the SLM's probability of its draft. `position`:
    tokens of the answer before it. `reply_seconds`: from the question to its reply."""

    p: float | None = None
    position: int | None = None
    reply_seconds: float | None = None


class Row(NamedTuple):
    """A step that was to be sent. `propensity`: with which it was; `least`: the least that any step had under the
    policy in force, which is its rate of audits, or 1 while it sends everything. `beta` None: the LLM did not tell.
    `cost`: tokens of the LLM that settled it (what it wrote in vain, and bytes, are counted per link)."""

    u: float
    propensity: float
    least: float
    outcome: Outcome
    beta: float | None = None
    cost: int = 0
    features: Features = Features()

    @property
    def usable(self) -> bool:
        """False for what no policy and no reply can give."""
        shares = (self.u, self.least, self.propensity, 0.0 if self.beta is None else self.beta)
        return all(0.0 <= share <= 1.0 for share in shares) and self.propensity > 0.0 and self.cost >= 0


class Since(NamedTuple):
    """Steps that were not sent since the last row: how many, and the least propensity of any."""

    kept: int = 0
    least: float = 1.0


Fields: TypeAlias = tuple[float, float | None, float, float, str, int]  # as in Columns


class Entry(NamedTuple):
    """A row with what lies between it and the one before."""

    row: Row
    since: Since

    @property
    def fields(self) -> Fields:
        row, (kept, least) = self
        return row.u, row.beta, row.propensity, min(row.least, least), row.outcome.value, kept


class Columns(NamedTuple):
    """Rows as arrays (n,), oldest first. `beta` is NaN where the LLM did not tell. `least`: of the row and of the kept
    steps before it."""

    u: Floats
    beta: Floats
    propensity: Floats
    least: Floats
    outcome: NDArray[np.str_]
    kept: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Fields]) -> Columns:
        u, beta, propensity, least, outcome, kept = zip(*rows, strict=True) if rows else [()] * 6
        return cls(
            np.array(u, np.float64),
            np.array(beta, np.float64),
            np.array(propensity, np.float64),
            np.array(least, np.float64),
            np.array(outcome, np.str_),
            np.array(kept, np.int64),
        )

    def sample(self, most: int | None = None) -> Sample:
        """The rows that the LLM answered, the last `most` of them; where it told no probability, beta is 1 if
        it wrote another token, else 0.

        What memory or a peer answered would not have reached the cloud: such rows are left out, and the steps kept
        before them belong to the next one that went there. What nobody answered is missing: it is left out with the
        steps that belong to it, or an outage would look as if nothing differed.
        """
        differs = self.outcome == Outcome.DIFFERED
        answered = differs | (self.outcome == Outcome.AGREED)
        sent = np.flatnonzero(answered | (self.outcome == Outcome.FALLBACK))
        if not len(sent):
            return Sample.empty()
        first, end = np.concatenate([[0], sent[:-1] + 1]), int(sent[-1]) + 1
        kept, least = np.add.reduceat(self.kept[:end], first), np.minimum.reduceat(self.least[:end], first)
        rows = np.flatnonzero(answered[sent])
        rows = rows if most is None else rows[-most:]
        at = sent[rows]
        return Sample(
            u=self.u[at],
            beta=np.where(np.isnan(self.beta), differs, self.beta)[at],
            propensity=self.propensity[at],
            differs=differs[at],
            kept=kept[rows],
            least=least[rows],
        )
