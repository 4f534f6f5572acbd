"""A device's threshold from its own evidence and what others learned: the less it knows itself, the more it believes
them (empirical Bayes: Efron and Morris, 1973)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agent.learn.sample import Histogram, Own, Sample
from agent.learn.uhlm import Line
from protocol.rounds import Learned, Level, nearest

OWN = 25.0
"""n0: steps near the threshold (`Own.evidence`) at which a device believes itself as much as its cluster. The variance
of a learned threshold is 0.13 / evidence, in simulated streams of several kinds; so n0 = 0.13 / s**2 where devices
scatter around their cluster with standard deviation s, here 0.07, and clusters likewise around all."""

ENOUGH = 10.0
"""Evidence, of the device and of those that it hears of, from which on the configured threshold has no say."""

_STEEPEST = 100.0


def in_force(own: Own, learned: Learned | None, statistics: Sequence[float], start: float) -> float:
    """The threshold that a device goes by: `personal`, and `start`, the configured one, in so far as nobody knows much
    yet. One device that has seen little must not decide for a whole cluster that it has seen enough."""
    known = own.evidence
    if learned is not None:
        levels = [learned.cluster, learned.overall.level if learned.overall else None]
        known += max((level.evidence for level in levels if level is not None), default=0.0)
    weight = min(1.0, known / ENOUGH)
    return weight * personal(own, learned, statistics) + (1.0 - weight) * start


def personal(own: Own, learned: Learned | None, statistics: Sequence[float]) -> float:
    """w own + (1 - w) prior with w = n / (n + n0), n the own evidence. The prior is what the cluster learned, mixed
    with what all did; where the coordinator groups devices by their statistics, the nearest group stands for the
    cluster."""
    prior = _prior(learned, statistics)
    if prior is None or math.isinf(own.evidence):
        return own.threshold
    weight = own.evidence / (own.evidence + OWN)
    return weight * own.threshold + (1.0 - weight) * prior


def _prior(learned: Learned | None, statistics: Sequence[float]) -> float | None:
    if learned is None:
        return None
    near: Level | None = learned.cluster
    if learned.overall is None:
        return near.threshold if near is not None else None
    group = nearest(statistics, learned.overall)
    if group is not None:
        near = learned.overall.groups[group]
    overall = learned.overall.level.threshold
    if near is None or near.evidence <= 0.0 or near.devices <= 0:
        return overall
    # A cluster's mean is uncertain by its data, and because its devices are but some of those it might have.
    weight = 1.0 / (1.0 + OWN / near.evidence + 1.0 / near.devices)
    return weight * near.threshold + (1.0 - weight) * overall


def statistics(sample: Sample, seen: Histogram) -> list[float]:
    """What devices are told apart by, in the order of protocol.rounds.STATISTICS: the mean of u over all steps, the
    mean of beta over all steps (estimated), the slope of beta on u. Zeros where nothing was seen yet."""
    if not len(sample):
        return [seen.mean, 0.0, 0.0]
    weights = sample.weights()
    beta = float((weights * sample.beta).sum() / weights.sum())
    return [seen.mean, beta, float(np.clip(Line.fit(sample).a, -_STEEPEST, _STEEPEST))]
