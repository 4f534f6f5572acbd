"""One level for several clusters.

The mean of their thresholds weighted by evidence, as the cloud's in hierarchical federated averaging (Liu et al. 2020,
arXiv 1905.06641), with two bounds, because one cluster may be broken or lie:

- evidence counts up to a ceiling at which the fifth of the clusters that claims most (one, of fewer than ten) has
  `most_share` of the weights;
- a threshold counts up to REACH away from the weighted median (one step of Huber's estimator, 1964).

With three clusters or more and a share below one half, whatever such a fifth says moves the result at most
`most_share` * REACH out of the range of the others. Of two clusters nobody can tell which one is wrong: both count
the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from protocol.rounds import MAX_NUMBER, Level

REACH = 0.25
_MOST_EVIDENCE = 1e12  # as in protocol.rounds


def combine(levels: Sequence[Level], most_share: float) -> Level | None:
    """None: there is no evidence at all. `evidence` is what counted, so no cluster can claim the whole's."""
    levels = [level for level in levels if level.evidence > 0.0]
    if not levels:
        return None
    top = ceiling([level.evidence for level in levels], most_share)
    weights = [min(level.evidence, top) for level in levels]
    total = math.fsum(weights)
    thresholds = [level.threshold for level in levels]
    middle = weighted_median(thresholds, weights)
    within = [min(max(threshold, middle - REACH), middle + REACH) for threshold in thresholds]
    mean = math.fsum(weight * each for weight, each in zip(weights, within, strict=True)) / total
    return Level(
        threshold=min(max(mean, min(thresholds)), max(thresholds)),  # a rounding error may be outside
        evidence=min(total, _MOST_EVIDENCE),
        devices=min(sum(level.devices for level in levels), MAX_NUMBER),
    )


def ceiling(evidence: Sequence[float], most_share: float) -> float:
    """The largest c such that of all min(e, c) the largest fifth adds up to no more than `most_share` of their sum, or
    to its part of equal weights if that is more."""
    ordered = sorted(evidence, reverse=True)
    count = len(ordered)
    few = max(1, count // 5)
    share = max(most_share, few / count)
    if math.fsum(ordered[:few]) <= share * math.fsum(ordered):
        return ordered[0]
    for capped in range(1, count):  # of the sum, capped * c is theirs, and the others' is as it was
        room = min(capped, few) - share * capped
        if room <= 1e-9:
            break
        top = (share * math.fsum(ordered[capped:]) - math.fsum(ordered[capped:few])) / room
        if ordered[capped] <= top:
            return top
    return ordered[-1]


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The middle of all values that have at most half of the weight on each side."""
    pairs = sorted(zip(values, weights, strict=True))
    half = math.fsum(weights) / 2
    below = 0.0
    low: float | None = None
    for value, weight in pairs:
        below += weight
        if low is None and below >= half:
            low = value
        if low is not None and below > half:
            return (low + value) / 2
    return pairs[-1][0]
