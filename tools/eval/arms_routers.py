"""Policies that are fitted on calls which every step, or every request, makes at first; and the router head."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.learn.federation import LEAST_EVIDENCE
from agent.learn.sample import Sample
from agent.learn.uhlm import Line
from server.edge.aggregate import aggregate, weigh
from tools.eval.arms_learned import AUDIT, START
from tools.eval.fleets import Fleet, Pool, Rows
from tools.eval.play import Bools, Policy, Seen

CALIBRATION = 0.25  # share of the rounds in which a router asks about everything
POINTS = 100  # least steps from which U-HLM's line is fitted, as its authors recommend

Numbers = NDArray[np.float64]


class Calibrated(Policy):
    """Asks about everything until the fleet has seen `points` answers in at least `rounds` rounds, then never learns
    again. What was seen goes to one place, `width` numbers for each step."""

    width = 0
    points = 1
    rounds = 1

    def __init__(self, steps: Pool, drawn: Fleet) -> None:
        super().__init__()
        self.steps = steps
        self.drawn = drawn
        self._ready = False

    def ask(self, rows: Rows) -> Bools:
        return self.route(rows) if self._ready else np.ones(len(rows), bool)

    def learn(self, at: int, seen: Sequence[Seen]) -> None:
        rows = np.concatenate([one.rows for one in seen])
        last = at + 1 == len(self.drawn.stream)
        if not self._ready and (last or (len(rows) >= self.points and at + 1 >= self.rounds)):
            self._ready = True
            self.fit(seen)
            self.learning_bytes = [len(rows) * len(msgspec.msgpack.encode([0.1] * self.width)), 0]

    def fit(self, seen: Sequence[Seen]) -> None: ...

    def route(self, rows: Rows) -> Bools:
        raise NotImplementedError


class Uhlm(Calibrated):
    """U-HLM (arXiv 2412.12687): beta is taken to be linear in the share of perturbed draws that differ; one threshold
    where the line crosses 0 (risk-averse) or P(y_d < x_d) (risk-prone)."""

    width = 2
    points = POINTS

    def __init__(self, steps: Pool, drawn: Fleet, *, averse: bool) -> None:
        super().__init__(steps, drawn)
        self._averse = averse
        self.tau = 0.0

    def fit(self, seen: Sequence[Seen]) -> None:
        data = self.steps.data
        line = Line.fit(Sample.join([one.sample(data, 0.0, data.temperature) for one in seen]))
        self.tau = line.averse() if self._averse else line.prone()

    def route(self, rows: Rows) -> Bools:
        asked: Bools = self.steps.data.temperature[rows] > self.tau
        return asked


class Query(Calibrated):
    """Whole requests go to the LLM, by the prompt alone, as in RouteLLM (arXiv 2406.18665): a logistic regression of
    "the LLM wins" on what the SLM makes of the prompt (its hidden state before the answer, projected). A request's
    label is the share of its drafts that the LLM would not have written: nobody tells a device what is right.

    `share`: of the requests of the calibration that would have gone to the LLM."""

    def __init__(self, steps: Pool, drawn: Fleet, share: float) -> None:
        super().__init__(steps, drawn)
        self.rounds = max(1, round(CALIBRATION * len(drawn.stream)))
        self.width = steps.data.hidden.shape[1] + 1
        self._share = share
        first = _first(steps)
        self._inputs = _inputs(steps.data.hidden[first])  # (n, width): the request's, at each of its steps
        self._scores = np.zeros(len(first))
        self._cut = 0.5

    def fit(self, seen: Sequence[Seen]) -> None:
        rows = np.concatenate([one.rows for one in seen])
        data = self.steps.data
        _, request = np.unique(data.item[rows], return_inverse=True)
        wins = np.bincount(request, data.differs[rows]) / np.bincount(request)
        sizes = 1.0 / np.bincount(request)[request]  # a request counts once, however long its answer
        for kind in range(len(self.steps.slms)):
            mine = self.steps.kind[rows] == kind
            if mine.any():
                inputs, goal = self._inputs[rows[mine]], wins[request][mine]
                weights = logistic(inputs, goal, sizes[mine], np.zeros(inputs.shape[1]), held=1.0)
                of_kind = self.steps.kind == kind
                self._scores[of_kind] = sigmoid(self._inputs[of_kind] @ weights)
        requests = np.unique(data.item[rows], return_index=True)[1]
        self._cut = float(np.quantile(self._scores[rows[requests]], 1.0 - self._share))

    def route(self, rows: Rows) -> Bools:
        asked: Bools = self._scores[rows] > self._cut
        return asked


class Head(Policy):
    """A logistic model of beta on the step's features, learned in the same rounds, one per small model: each device
    fits its own sample, held near what was agreed (FedProx: Li et al., 2020), and the edge averages. Escalates where it
    exceeds the price. `columns`: of the features; the first is u."""

    audit = AUDIT
    columns = slice(None)

    def __init__(self, steps: Pool, drawn: Fleet, price: float) -> None:
        super().__init__()
        self.steps = steps
        self.drawn = drawn
        self.price = price
        self._inputs = _inputs(steps.data.features[:, self.columns])
        self._agreed: dict[int, Numbers] = {}  # of each small model

    def ask(self, rows: Rows) -> Bools:
        asked = self.steps.data.u[rows] > START
        for kind, weights in self._agreed.items():
            mine = self.steps.kind[rows] == kind
            asked[mine] = sigmoid(self._inputs[rows[mine]] @ weights) > self.price
        return asked

    def learn(self, at: int, seen: Sequence[Seen]) -> None:
        for kind in range(len(self.steps.slms)):
            old = self._agreed.get(kind, np.zeros(self._inputs.shape[1]))
            fitted, evidence = [], []
            for device in np.flatnonzero(self.drawn.kind == kind).tolist():
                sample = seen[device].sample(self.steps.data, self.audit)
                weights = sample.weights()
                known = float(weights.sum() ** 2 / (weights**2).sum()) if len(sample) else 0.0
                if known >= LEAST_EVIDENCE:
                    inputs = self._inputs[seen[device].rows]
                    fitted.append(logistic(inputs, sample.beta, weights, old, held=1.0))
                    evidence.append(known)
            if fitted:
                self._agreed[kind] = aggregate(fitted, weigh(evidence, [0] * len(fitted), "mean"), "mean")
                self._count(len(fitted), int((self.drawn.kind == kind).sum()))

    def _count(self, told: int, devices: int) -> None:
        size = len(msgspec.json.encode([1.2345678901234567] * self._inputs.shape[1]))
        self.learning_bytes[0] += told * size
        self.learning_bytes[1] += devices * size


class HeadOfU(Head):
    """Two numbers: what the same way of learning makes of u alone."""

    columns = slice(1)


def logistic(inputs: Numbers, goal: Numbers, weights: Numbers, near: Numbers, held: float) -> Numbers:
    """(p,) Minimum of the cross-entropy of `goal` (n,), in [0, 1], under sigmoid(inputs @ w), plus
    held / 2 |w - near|^2: Newton's method, each step halved until it helps."""
    w = near.copy()

    def cost(at: Numbers) -> float:
        z = inputs @ at
        return float((weights * (np.logaddexp(0.0, z) - goal * z)).sum() + held / 2 * ((at - near) ** 2).sum())

    now = cost(w)
    for _ in range(30):
        p = sigmoid(inputs @ w)
        gradient = inputs.T @ (weights * (p - goal)) + held * (w - near)
        curvature = (inputs * (weights * p * (1 - p))[:, None]).T @ inputs + held * np.eye(len(w))
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-4 and cost(w - size * step) > now:
            size /= 2
        w = w - size * step
        before, now = now, cost(w)
        if before - now < 1e-6 * (1.0 + abs(now)):
            break
    return w


def sigmoid(z: Numbers) -> Numbers:
    half: Numbers = 0.5 * (1.0 + np.tanh(0.5 * z))
    return half


def _inputs(columns: NDArray[np.float16] | NDArray[np.float32]) -> Numbers:
    """(n, p + 1), a column of ones first."""
    return np.concatenate([np.ones((len(columns), 1)), columns.astype(np.float64)], axis=1)


def _first(steps: Pool) -> Rows:
    """(n,) The row of the first step of each step's request."""
    _, first, which = np.unique(steps.data.item, return_index=True, return_inverse=True)
    rows: Rows = first[which]
    return rows
