"""Many devices' values as one: weighted mean, median or trimmed mean, and how much each device counts.

With equal weights, and for the mean with any, the results are those of Flower (flwr.server.strategy.aggregate: FedAvg,
FedMedian, FedTrimmedAvg).

Evidence is a claim, so what it may weigh depends on the method:

- The mean weighs by evidence, at most `CAP` times the median claim. One of n devices, whatever it claims, has at most
  CAP times the weight of the typical one; but a minority can still move a mean as far as its share reaches.
- Median and trimmed mean give every device the same weight, as Flower does. If evidence counted, a fifth of the devices
  could claim the cap and hold half of the weight, which is where robust statistics end.

With n devices of which m lie, and k >= m cut off at each end, the i-th value kept is at most the i-th of the honest
ones in the same place, and at least the honest one m places lower. So the trimmed mean lies between the means of the
honest values of ranks k+1-m to n-k-m and of ranks k+1 to n-k. The median is the same with one value, or two, kept: for
m = n/5 it lies between the 37.5th and the 62.5th percentile of the honest values. Where those are normal with standard
deviation s, that is 0.32 s for the median, and 0.37 s for the mean with a quarter trimmed at each end. If some are
late, the means are weighted, and for the median m is a share of the weight. Of fewer than 4 devices a quarter is
nobody, and the trimmed mean is the mean.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Method: TypeAlias = Literal["mean", "median", "trimmed"]

CAP = 4.0
TRIM = 0.25  # of the devices at each end: a fifth that lies is cut off with room to spare
_STALENESS = 0.5  # exponent


def weigh(evidence: ArrayLike, lag: ArrayLike, method: Method) -> Floats:
    """What each device counts, (n,), for `aggregate`. `evidence`: (n,), positive; `lag`: (n,), rounds it is late."""
    late = discount(lag)
    return capped(evidence) * late if method == "mean" else late


def capped(evidence: ArrayLike) -> Floats:
    """(n,) -> (n,): at most CAP times the median. Of an even number, the lower of the two in the middle: of two devices
    one must not lift the cap for itself."""
    claims = np.asarray(evidence, np.float64)
    if not claims.size:
        return claims
    middle = (claims.size - 1) // 2
    most: Floats = np.minimum(claims, CAP * np.partition(claims, middle)[middle])
    return most


def discount(lag: ArrayLike) -> Floats:
    """(n,) -> (n,): (1 + lag)^-0.5, FedAsync's polynomial staleness (Xie et al., arXiv 1903.03934, section 5.2)."""
    late: Floats = (1.0 + np.asarray(lag, np.float64)) ** -_STALENESS
    return late


def aggregate(values: ArrayLike, weights: ArrayLike, method: Method, trim: float = TRIM) -> Floats:
    """(n, p), (n,) -> (p,), each parameter by itself. `trim`: share of the devices cut off at each end, below 0.5,
    rounded down to whole devices, whatever their weights: honest devices that are late must not make room for lies.
    With different weights the median is where half of the weight is on either side. Raises ValueError if nobody is
    there, or somebody has no weight."""
    of = np.asarray(values, np.float64)
    by = np.asarray(weights, np.float64)
    if of.ndim != 2 or by.shape != of.shape[:1]:
        raise ValueError(f"values must be (n, p) and weights (n,), not {of.shape} and {by.shape}")
    if not by.size or not (by > 0.0).all():
        raise ValueError("there must be weights, and all of them above 0")
    if not 0.0 <= trim < 0.5:
        raise ValueError(f"trim is {trim}, and must be at least 0 and below 0.5")
    if method == "mean":
        mean: Floats = np.einsum("np,n->p", of, by) / by.sum()
        return mean
    by = by / by.max()  # so that equal weights are exactly 1, and their sums exact
    order = np.lexsort((np.broadcast_to(by[:, None], of.shape), of), axis=0)  # of equal values by weight: one order
    ranked, by = np.take_along_axis(of, order, axis=0), by[order]
    return _median(ranked, by) if method == "median" else _trimmed(ranked, by, trim)


def _median(ranked: Floats, by: Floats) -> Floats:
    """Mean of the lowest values with at least, and with more than, half of the weight up to them."""
    up_to = np.cumsum(by, axis=0)
    half = up_to[-1] / 2.0
    places = ((up_to >= half).argmax(axis=0), (up_to > half).argmax(axis=0))
    low, high = (np.take_along_axis(ranked, place[None], axis=0)[0] for place in places)
    median: Floats = (low + high) / 2.0
    return median


def _trimmed(ranked: Floats, by: Floats, trim: float) -> Floats:
    """Weighted mean of the devices that are left."""
    cut = int(trim * len(ranked))
    left = slice(cut, len(ranked) - cut)
    mean: Floats = (ranked[left] * by[left]).sum(axis=0) / by[left].sum(axis=0)
    return mean
