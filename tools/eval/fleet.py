"""The devices' run over recorded steps: who writes each token, under which policy, with which rule of reuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.memory.base import Neighbour
from agent.memory.key import shared_tail
from agent.memory.rule import NEIGHBOURS, PLAUSIBLE, Candidate, judge
from agent.memory.rule_evidence import Evidence
from models.sampling import uniform
from tools.eval.steps import Steps
from tools.eval.stream import Recorded, Visit

AUDIT = 0.05  # share of the hits that the cloud is asked about all the same
LOCAL, MEMORY, CLOUD = 0, 1, 2

Hit = Callable[[Candidate, float], bool]  # of the candidate and its probability under x


@dataclass(frozen=True, slots=True)
class Rule:
    """A fixed rule of reuse. `by`: what of the candidate is compared with `least`; `gate`: must it be plausible?"""

    by: str  # "similarity" or "score"
    least: float
    gate: bool

    def hit(self, candidate: Candidate, x: float) -> bool:
        return float(getattr(candidate, self.by)) >= self.least and (x >= PLAUSIBLE or not self.gate)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry per step, in the order of the visits. `row`: in the recordings; `visit`: which one; `who` wrote it;
    `token`: what; `hit`: it was one, audited or not; `candidate`: memory's, -1 if it was not asked or had none."""

    row: NDArray[np.intp]
    visit: NDArray[np.intp]
    who: NDArray[np.int8]
    token: NDArray[np.int32]
    hit: NDArray[np.bool_]
    candidate: NDArray[np.int32]
    theta: float  # at the end


def run(data: Recorded, order: Sequence[Visit], tau: float, rule: Rule | Evidence | None, seed: int = 0) -> Outcome:
    """Steps with u > tau are escalated: to memory, which all devices share, by `rule`, and if that is no hit to the
    LLM, whose answer is remembered. `rule`: fixed, learned (Evidence), or None: there is no memory."""
    steps = data.steps
    rows = np.concatenate([np.arange(data.texts[v.text].rows.start, data.texts[v.text].rows.stop) for v in order])
    visit = np.concatenate([np.full(len(data.texts[v.text].rows), at) for at, v in enumerate(order)])
    token, who = steps.draft[rows].copy(), np.full(len(rows), LOCAL, np.int8)
    hit, candidates = np.zeros(len(rows), bool), np.full(len(rows), -1, np.int32)
    kept, nothing = _Kept(data, len(rows)), Evidence()
    for at in np.flatnonzero(steps.u[rows] > tau):
        row = int(rows[at])
        x = _plausibility(steps, row)
        draft, target = int(steps.draft[row]), int(steps.target[row])
        evidence = rule if isinstance(rule, Evidence) else nothing
        candidate = judge(kept.near(row), x, draft, evidence) if rule is not None else None
        propensity = max(AUDIT, rule.audit_rate) if isinstance(rule, Evidence) else AUDIT
        audit = uniform(seed, int(at)) < propensity
        if candidate is not None:
            candidates[at] = candidate.token
            hit[at] = rule.hit(candidate, x(candidate.token)) if isinstance(rule, Rule) else candidate.hit
            if hit[at] and not audit:
                who[at], token[at] = MEMORY, candidate.token
                continue
            if isinstance(rule, Evidence):
                rule.note(
                    candidate.score,
                    memory_right=candidate.token == target,
                    draft_right=draft == target,
                    agree=candidate.token == draft,
                    propensity=propensity if hit[at] else 1.0,
                )
        who[at], token[at] = CLOUD, target
        kept.add(row)
    theta = rule.theta if isinstance(rule, Evidence) else rule.least if rule is not None else float("nan")
    return Outcome(rows, visit, who, token, hit, candidates, theta)


class _Kept:
    """The shared memory: which recorded steps are in it. Exact search."""

    def __init__(self, data: Recorded, room: int) -> None:
        self._data = data
        self._rows = np.empty(room, np.intp)
        self._count = 0

    def add(self, row: int) -> None:
        self._rows[self._count] = row
        self._count += 1

    def near(self, row: int) -> list[Neighbour]:
        rows = self._rows[: self._count]
        similarity = self._data.similarity[row, rows]
        best = np.argpartition(-similarity, NEIGHBOURS)[:NEIGHBOURS] if self._count > NEIGHBOURS else slice(None)
        found = sorted(zip(similarity[best].tolist(), rows[best].tolist(), strict=True), reverse=True)
        return [self._neighbour(row, other, cosine) for cosine, other in found]

    def _neighbour(self, row: int, other: int, cosine: float) -> Neighbour:
        data = self._data
        return Neighbour(
            id=other,
            similarity=cosine,
            tail=shared_tail(data.tails[row], data.tails[other]),
            token=int(data.steps.target[other]),
            p=float(data.steps.target_p[other]),
            count=1,
            trust=1.0,
            origin=b"",
            key=data.keys[other],
        )


def _plausibility(steps: Steps, row: int) -> Callable[[int], float]:
    """x of a token; 0 beyond the likeliest that were recorded."""
    known = dict(zip(steps.top_ids[row].tolist(), steps.top_x[row].tolist(), strict=True))
    return lambda token: known.get(token, 0.0)
