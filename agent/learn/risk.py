"""A threshold under which the device rarely keeps what the LLM would have written otherwise, with confidence.

The risk of a threshold is R(tau) = P(u <= tau and the LLM's token differs), a share of all tokens. Each step gives an
unbiased estimate of it, X = 1(sent) 1(u <= tau) 1(differs) / propensity, whatever threshold was in force. For each tau
of a grid one bets against R(tau) >= bound: the wealth, a product of 1 + lambda (bound - X) with a lambda chosen before
each step, is a supermartingale if that is so, and exceeds 1 / (1 - confidence) at any time at all with probability at
most 1 - confidence (Ville, 1939; Waudby-Smith and Ramdas, arXiv 2010.09686; with chosen propensities Xu,
Karampatziakis and Mineiro, arXiv 2406.10490). R rises with tau, so one goes up the grid until the first threshold that
is not certified, and the confidence holds for all of them together (fixed sequence, arXiv 2110.01052).

It holds at every moment, for thresholds that were in force because of the same data. It presumes that the steps to
come are of the kind of those that were seen, and that the sample is whole: once the ledger forgets its oldest rows, it
holds at each moment by itself, no longer at all together.
"""

from __future__ import annotations

import math

import numpy as np

from agent.learn.sample import Floats, Sample

GRID = tuple(step / 100 for step in range(1, 101))
_LEAST = 1e-3  # of a policy that audits less, X could be over a thousand: its steps tell nothing
_MOST_LOSS = 0.5  # of the wealth, in one step
_PRIOR = 100.0  # steps for which half the bound is presumed before there are any
_HALVINGS = 20


def highest_threshold(sample: Sample, bound: float, confidence: float) -> float:
    """The highest threshold of GRID that is certified with all below it; 0 (everything is asked) if none is."""
    highest = 0.0
    evidence = _Evidence(sample)
    for tau in GRID:
        if evidence.log_wealth(tau, bound) < -math.log1p(-confidence):
            break
        highest = tau
    return highest


def upper_bound(sample: Sample, tau: float, confidence: float) -> float:
    """The least bound on R(tau) that the sample certifies, to six digits; 1 if none."""
    evidence = _Evidence(sample)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        certified = evidence.log_wealth(tau, middle) >= -math.log1p(-confidence)
        low, high = (low, middle) if certified else (middle, high)
    return high


def estimate(sample: Sample, tau: float) -> float:
    """R(tau), unbiased but for steps that nobody audits; 0 without a sample."""
    return _Evidence(sample).mean(tau)


class _Evidence:
    """Rows whose steps were all sent with a propensity that is known and not too small; each stands behind `kept` steps
    with X = 0. Leaving out the others does no harm: it depends on the policy alone, not on what the LLM said."""

    def __init__(self, sample: Sample) -> None:
        least = np.minimum(sample.least, sample.propensity)
        usable = least >= _LEAST
        self._u = sample.u[usable]
        self._x = np.where(sample.differs, 1.0 / np.maximum(sample.propensity, _LEAST), 0.0)[usable]
        self._kept = sample.kept[usable].astype(np.float64)
        self._most = 1.0 / least[usable]
        self._weight = _before((self._kept + 1.0) / self._most) + _PRIOR

    def mean(self, tau: float) -> float:
        steps = len(self._u) + float(self._kept.sum())
        return float(self._x[self._u <= tau].sum()) / steps if steps else 0.0

    def log_wealth(self, tau: float, bound: float) -> float:
        x = np.where(self._u <= tau, self._x, 0.0)
        bets = self._bets(x, bound)
        return float((self._kept * np.log1p(bets * bound) + np.log1p(bets * (bound - x))).sum())

    def _bets(self, x: Floats, bound: float) -> Floats:
        """(n,) lambda of each row and of the kept steps before it, from the rows before.

        Kelly's bet (1956) on X that is 0 or 1 / propensity: the share 1 - R / bound of the wealth that such an X would
        take. R is estimated from the past, where audits, being rarer and coarser, count for less.
        """
        risk = (_before(x / self._most) + _PRIOR * bound / 2.0) / self._weight
        share = np.clip(1.0 - risk / bound, 0.0, _MOST_LOSS)
        return np.asarray(share / np.maximum(self._most - bound, 1.0 - bound))


def _before(values: Floats) -> Floats:
    """(n,) Sum of the ones before each."""
    return np.asarray(np.cumsum(values) - values)
