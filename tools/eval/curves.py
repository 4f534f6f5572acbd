"""Quality against the share of the LLM, with intervals: points, areas, and differences at equal share.

Every figure is a mean over seeds; a seed draws the split, the fleet and what is random in it. Its interval is that of
the 95 % in the middle of a bootstrap, in which documents and seeds are drawn anew with replacement, a document's weight
being the same in all seeds and arms. So differences between arms are paired.

*Area*: under the straight lines through an arm's points in the order of their shares, from what the SLM alone reaches
at share 0 to what the LLM alone reaches at 1.
*Lift* of a point: its quality less that of the best static threshold at the same share, on the same steps.
*Regret* of a point at a price: mean of (beta of what was kept, price of what was sent) less that of the threshold which
would have been best for the whole fleet on the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.eval.arms import Arm, Played
from tools.eval.fleets import Fleet, Pool, Rows

Numbers = NDArray[np.float64]

REPLICATES = 300
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True, slots=True)
class Estimate:
    """`all` (1 + R,): the figure itself, then its bootstrap replicates."""

    all: Numbers

    @property
    def value(self) -> float:
        return float(self.all[0])

    @property
    def interval(self) -> tuple[float, float]:
        low, high = np.percentile(self.all[1:], INTERVAL)
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.all - other.all)


@dataclass(frozen=True, slots=True)
class Points:
    """K settings of one arm in S seeds, each (1 + R, S, K): the first of the replicates is the estimate. `cost`: mean
    beta of what was kept."""

    share: Numbers
    quality: Numbers
    agreement: Numbers
    lift: Numbers
    cost: Numbers


@dataclass(frozen=True, slots=True)
class Curve:
    """One arm. `runs[seed][setting]`; `share`, `quality` (1 + R, K), means over the seeds that a replicate has drawn,
    `chosen` (1 + R, S)."""

    arm: Arm
    runs: Sequence[Sequence[Played]]
    points: Points
    chosen: Rows
    share: Numbers
    quality: Numbers
    area: Estimate

    def mean(self, values: Numbers) -> Numbers:
        """(1 + R, S, K) -> (1 + R, K)"""
        return _over_seeds(values, self.chosen)


class Bench:
    """The replicates, the same for all arms of one pool of steps and its fleets, one per seed."""

    def __init__(self, steps: Pool, fleets: Sequence[Fleet], seed: int = 0, replicates: int = REPLICATES) -> None:
        rng = np.random.default_rng(seed)
        self._steps = steps
        self._fleets = fleets
        self._best: dict[tuple[int, tuple[float, ...]], Numbers] = {}
        documents, self._document = np.unique(steps.data.document, return_inverse=True)
        drawn = rng.multinomial(len(documents), np.full(len(documents), 1 / len(documents)), size=replicates)
        self._weights = np.concatenate([np.ones((1, len(documents))), drawn])
        seeds = np.arange(len(fleets))
        self._chosen = np.concatenate([seeds[None], rng.integers(0, len(seeds), (replicates, len(seeds)))])
        self._static = [self._curve(fleet.fresh, steps.data.u) for fleet in fleets]
        ends = _over_seeds(np.stack([quality[:, [0, -1]] for _, quality in self._static], axis=1), self._chosen)
        self.slm, self.llm = Estimate(ends[:, 0]), Estimate(ends[:, 1])  # the quality of each alone

    def plain(self) -> Bench:
        """The same without intervals."""
        return Bench(self._steps, self._fleets, replicates=0)

    def curve(self, arm: Arm, runs: Sequence[Sequence[Played]]) -> Curve:
        """`runs[seed][setting]`."""
        figures = [self._figures(fleet.fresh, own) for fleet, own in zip(self._fleets, runs, strict=True)]
        share, quality, agreement, cost = (np.stack(part, axis=1) for part in zip(*figures, strict=True))
        lift = quality - np.stack([self._reference(s, share[:, s]) for s in range(len(runs))], axis=1)
        points = Points(share, quality, agreement, lift, cost)
        x, y = _over_seeds(share, self._chosen), _over_seeds(quality, self._chosen)
        return Curve(arm, runs, points, self._chosen, x, y, area(x, y, self.slm, self.llm))

    def static_area(self, u: NDArray[np.float32]) -> Estimate:
        """Under the curve of all thresholds on another measure of uncertainty, (n,)."""
        curves = [self._curve(fleet.fresh, u) for fleet in self._fleets]
        areas = [_under(x, y) for x, y in curves]
        return Estimate(_over_seeds(np.stack(areas, axis=1), self._chosen))

    def regret(self, curve: Curve) -> Numbers:
        """(1 + R, K): of an arm whose settings are prices."""
        prices = curve.arm.settings
        best = np.stack([self._cheapest(seed, prices) for seed in range(len(self._fleets))], axis=1)
        return curve.mean(curve.points.cost + np.asarray(prices) * curve.points.share - best)

    def _figures(self, fresh: Rows, runs: Sequence[Played]) -> list[Numbers]:
        """(1 + R, K) each: share, quality, agreement, beta of what was kept."""
        data = self._steps.data
        p = np.stack([one.sent for one in runs], axis=1)  # (m, K)
        right = p * data.llm_right[fresh, None] + (1 - p) * np.stack([one.right for one in runs], axis=1)
        agree = p + (1 - p) * np.stack([one.agree for one in runs], axis=1)
        kept = (1 - p) * data.beta[fresh, None]
        return [self._mean(fresh, values) for values in (p, right, agree, kept)]

    def _mean(self, rows: Rows, values: Numbers) -> Numbers:
        """(m, K) -> (1 + R, K), by the weights of the documents."""
        order = np.argsort(self._document[rows], kind="stable")
        documents, starts, counts = np.unique(self._document[rows][order], return_index=True, return_counts=True)
        weights = self._weights[:, documents]
        means: Numbers = weights @ np.add.reduceat(values[order], starts, axis=0) / (weights @ counts)[:, None]
        return means

    def _curve(self, fresh: Rows, u: NDArray[np.float32]) -> tuple[Numbers, Numbers]:
        """(1 + R, T) each: share and quality of every threshold on u (n,) on these steps, from none sent to all."""
        data = self._steps.data
        rows = fresh[np.argsort(-u[fresh], kind="stable")]
        gain = data.llm_right[rows].astype(float) - data.slm_right[rows]
        sent, gained = self._rising(rows, u, np.ones(len(rows))), self._rising(rows, u, gain)
        base = self._mean(fresh, data.slm_right[fresh, None].astype(float))
        return sent, base + gained

    def _rising(self, rows: Rows, u: NDArray[np.float32], values: Numbers) -> Numbers:
        """(1 + R, T): what the first steps add up to, per step of all, where a threshold can lie behind them."""
        ends = np.flatnonzero(np.diff(u[rows], append=-1.0))
        weights = self._weights[:, self._document[rows]]
        sums = np.cumsum(weights * values, axis=1)[:, ends] / weights.sum(axis=1, keepdims=True)
        return np.concatenate([np.zeros((len(sums), 1)), sums], axis=1)

    def _reference(self, seed: int, share: Numbers) -> Numbers:
        """(1 + R, K) -> (1 + R, K): the best static threshold's quality at these shares."""
        curves = zip(share, *self._static[seed], strict=True)
        return np.stack([np.interp(at, sent, reached) for at, sent, reached in curves])

    def _cheapest(self, seed: int, prices: Sequence[float]) -> Numbers:
        """(1 + R, K): what the best threshold for all comes to at each price."""
        known = (seed, tuple(prices))
        if known not in self._best:
            self._best[known] = self._cheapest_of(self._fleets[seed].fresh, prices)
        return self._best[known]

    def _cheapest_of(self, fresh: Rows, prices: Sequence[float]) -> Numbers:
        data = self._steps.data
        rows = fresh[np.argsort(-data.u[fresh], kind="stable")]
        spared = self._rising(rows, data.u, data.beta[rows].astype(float))
        sent = self._rising(rows, data.u, np.ones(len(rows)))
        best = [(spared[:, -1:] - spared + price * sent).min(axis=1) for price in prices]
        return np.stack(best, axis=1)


def _over_seeds(values: Numbers, chosen: Rows) -> Numbers:
    """(1 + R, S, ...) -> (1 + R, ...): each replicate's mean over the seeds that it has drawn."""
    means: Numbers = values[np.arange(len(values))[:, None], chosen].mean(axis=1)
    return means


def area(share: Numbers, quality: Numbers, slm: Estimate, llm: Estimate) -> Estimate:
    """`share`, `quality`: (1 + R, K), means over seeds."""
    order = np.argsort(share, axis=1, kind="stable")
    x, y = np.take_along_axis(share, order, axis=1), np.take_along_axis(quality, order, axis=1)
    first, last = np.zeros((len(x), 1)), np.ones((len(x), 1))
    return Estimate(_under(np.hstack([first, x, last]), np.hstack([slm.all[:, None], y, llm.all[:, None]])))


def _under(x: Numbers, y: Numbers) -> Numbers:
    """(1 + R, T), (1 + R, T) -> (1 + R,)"""
    under: Numbers = (np.diff(x, axis=1) * (y[:, 1:] + y[:, :-1]) / 2).sum(axis=1)
    return under


def least_share(share: Numbers, quality: Numbers, slm: float, llm: float, wanted: float) -> float | None:
    """The least share at which the lines of `area` reach `wanted`. `share`, `quality`: (K,). None: nowhere."""
    order = np.argsort(share, kind="stable")
    xs, ys = np.concatenate([[0.0], share[order], [1.0]]), np.concatenate([[slm], quality[order], [llm]])
    for x, y, next_x, next_y in zip(xs, ys, [*xs[1:], 1.0], [*ys[1:], llm], strict=True):
        if y >= wanted:
            return float(x)
        if next_y >= wanted:
            return float(x + (next_x - x) * (wanted - y) / (next_y - y))
    return None
