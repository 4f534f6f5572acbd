"""Why the threshold is what it is, for people: what was seen by uncertainty, and what other goals would choose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.learn.goals import Bound, Goal, Price, Share, own
from agent.learn.risk import estimate, upper_bound
from agent.learn.sample import BINS, Histogram, Sample
from agent.learn.uhlm import Line

CONFIDENCE = 0.95
_ROWS = 16
_USUAL: tuple[Goal, ...] = (Price(0.1), Price(0.2), Price(0.4), Share(0.1), Share(0.3), Bound(0.02), Bound(0.05))


@dataclass(frozen=True, slots=True)
class Bin:
    """Steps with `low` <= u < `high`. `share` of all steps; `rows`: how many of them the LLM was heard on; of these the
    means of beta and of whether the LLM wrote another token, None without rows."""

    low: float
    high: float
    share: float
    rows: int
    beta: float | None
    differs: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """A threshold. `sent`: share of the steps that it sends, audits included. `disagreement`: estimated share of all
    steps that are kept although the LLM would have written another token; `bound`: what it is at most, with 95 %
    confidence."""

    by: str
    threshold: float
    sent: float
    disagreement: float
    bound: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """`choices`: first the threshold in force, then what the goal and others would choose by this device's data."""

    steps: float
    rows: int
    bins: list[Bin]
    choices: list[Choice]


def explain(goal: Goal, sample: Sample, seen: Histogram, threshold: float, audit: float = 0.0) -> Explanation:
    """`threshold`, `audit`: in force."""
    line = Line.fit(sample)
    by = [("in force", threshold)]
    by += [(one.name, own(one, sample, seen, threshold, audit).threshold) for one in dict.fromkeys((goal, *_USUAL))]
    by += [("U-HLM risk-averse", line.averse()), ("U-HLM risk-prone", line.prone())] if len(sample) else []
    choices = [choice(name, at, sample, seen, audit) for name, at in by]
    return Explanation(seen.total, len(sample), _bins(sample, seen), choices)


def choice(by: str, threshold: float, sample: Sample, seen: Histogram, audit: float) -> Choice:
    """What a threshold does, by this device's data. `audit`: share of the steps below it that is sent all the same."""
    escalated = seen.above(threshold) if threshold > 0.0 else 1.0
    return Choice(
        by=by,
        threshold=threshold,
        sent=escalated + audit * (1.0 - escalated),
        disagreement=estimate(sample, threshold) if threshold > 0.0 else 0.0,
        bound=upper_bound(sample, threshold, CONFIDENCE) if threshold > 0.0 else 0.0,
    )


def _bins(sample: Sample, seen: Histogram) -> list[Bin]:
    shares = seen.counts.reshape(_ROWS, BINS // _ROWS).sum(axis=1) / max(seen.total, 1e-12)
    places = np.clip((sample.u * _ROWS).astype(np.int64), 0, _ROWS - 1)
    found = []
    for place in range(_ROWS):
        here = places == place
        rows = int(here.sum())
        beta, differs = (float(x[here].mean()) if rows else None for x in (sample.beta, sample.differs))
        found.append(Bin(place / _ROWS, (place + 1) / _ROWS, float(shares[place]), rows, beta, differs))
    return found
