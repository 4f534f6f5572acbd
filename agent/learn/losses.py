"""What a threshold costs, as a function that can be descended. The routing decision is softened,
s = sigmoid((u - tau) / kappa), so that it has a gradient; expectations are over all steps, estimated by inverse
propensity weights from those that were sent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from agent.learn.sample import Floats, Sample

KAPPA = 0.03
"""The width of the decision. On simulated streams of 20,000 steps with audits of 2 %, the learned threshold is off the
true one by this much (root mean square; where beta rises slowly with u / all at once):

    kappa 0.01: 0.042 / 0.009     0.02: 0.028 / 0.015     0.03: 0.023 / 0.022     0.05: 0.025 / 0.042

Smaller is noisier, larger is biased where beta is steep."""


class Loss(ABC):
    """Of a threshold tau in [0, 1] on a sample that is not empty."""

    def __init__(self, price: float, kappa: float = KAPPA) -> None:
        if not 0.0 < kappa <= 0.05:
            raise ValueError("kappa is in (0, 0.05]: a softer decision shifts the optimum")
        self.price = price
        self.kappa = kappa

    @abstractmethod
    def value(self, sample: Sample, tau: float) -> float: ...

    @abstractmethod
    def gradient(self, sample: Sample, tau: float) -> float:
        """d value / d tau."""

    def step(self, sample: Sample, tau: float) -> float:
        """The gradient divided by E[s (1 - s)] / kappa, to be descended along in its place: zero at the same tau, but
        in units of beta, and it does not vanish where tau is far from every u.

        Both are sums over s (1 - s), so the quotient is a mean over the steps near tau, weighted by the logistic
        kernel (Nadaraya, 1964; Watson, 1964). Its weights are scaled by the largest of them.
        """
        weights = self._near(sample, tau)
        return float((weights * self._slope(sample, tau)).sum() / weights.sum())

    def evidence(self, sample: Sample, tau: float) -> float:
        """How much the sample says for tau, in steps near it: those that are (Kish's effective number, 1965, each
        counted by the logistic kernel, which is 1 at tau), and how sure it is that tau lies between what should be kept
        and what should be sent, which is all that there is where the best threshold is an end of [0, 1]."""
        weights, kernel = sample.weights(), 4.0 * np.exp(_log_kernel(self._distance(sample, tau)))
        total = float((weights**2 * kernel).sum())
        near = float((weights * kernel).sum() ** 2 / total) if total > 0.0 else 0.0
        return min(near + self._surety(sample, tau), float(weights.sum() ** 2 / (weights**2).sum()), len(sample))

    def _surety(self, sample: Sample, tau: float) -> float:
        """z^2 of the less sure side of tau. z: by how many standard deviations the steps from tau on, as far as that is
        most, are worth what is done with them."""
        gain = sample.weights() * self._slope(sample, tau)
        below, above, audited = sample.u <= tau, sample.u > tau, sample.propensity < 1.0
        up = _most_sure(sample.u[above], gain[above]) ** 2 if above.any() else math.inf
        if below.any():
            return min(up, _most_sure(-sample.u[below], -gain[below]) ** 2)
        # All should be sent. Of those that were kept only audits tell: one that is still to come may say otherwise.
        kept = float(sample.kept.sum()) / sample.steps
        by_audits = _most_sure(sample.u[audited], gain[audited]) ** 2
        return min(up, (1.0 + by_audits) / kept) if kept else up

    @abstractmethod
    def _slope(self, sample: Sample, tau: float) -> Floats:
        """(n,) -d loss / d s of each step."""

    def _distance(self, sample: Sample, tau: float) -> Floats:
        return (sample.u - tau) / self.kappa

    def _soft(self, sample: Sample, tau: float) -> Floats:
        return 0.5 * (1.0 + np.tanh(0.5 * self._distance(sample, tau)))

    def _near(self, sample: Sample, tau: float) -> Floats:
        logs = np.log(sample.weights()) + _log_kernel(self._distance(sample, tau))
        return np.asarray(np.exp(logs - logs.max()))

    def _mean(self, sample: Sample, values: Floats) -> float:
        weights = sample.weights()
        return float((weights * values).sum() / weights.sum())


class PriceLoss(Loss):
    """Form A, L = E[(1 - s) beta + price s]: a draft that is kept costs what the LLM would object to it, one that is
    sent costs the price. As kappa goes to 0 its optimum is where E[beta | u = tau] = price, so that U-HLM's analytic
    thresholds are special cases (agent/learn/uhlm.py)."""

    def value(self, sample: Sample, tau: float) -> float:
        s = self._soft(sample, tau)
        return self._mean(sample, (1.0 - s) * sample.beta + self.price * s)

    def gradient(self, sample: Sample, tau: float) -> float:
        s = self._soft(sample, tau)
        return self._mean(sample, self._slope(sample, tau) * s * (1.0 - s)) / self.kappa

    def _slope(self, sample: Sample, tau: float) -> Floats:
        return sample.beta - self.price


class SquareLoss(Loss):
    """Form B, L = E[(s - beta)^2 + price s]: the decision is to be like beta. It crosses where beta = (1 + price) / 2,
    a far higher threshold than form A's."""

    def value(self, sample: Sample, tau: float) -> float:
        s = self._soft(sample, tau)
        return self._mean(sample, (s - sample.beta) ** 2 + self.price * s)

    def gradient(self, sample: Sample, tau: float) -> float:
        s = self._soft(sample, tau)
        return self._mean(sample, self._slope(sample, tau) * s * (1.0 - s)) / self.kappa

    def _slope(self, sample: Sample, tau: float) -> Floats:
        return 2.0 * (sample.beta - self._soft(sample, tau)) - self.price


def _log_kernel(distance: Floats) -> Floats:
    """log(s (1 - s)) of s = sigmoid(distance), exact however far."""
    near = np.abs(distance)
    return np.asarray(-near - 2.0 * np.log1p(np.exp(-near)))


def _most_sure(order: Floats, gain: Floats) -> float:
    """The largest z of the sums of the first gains in this order; 0 if none is above 0."""
    first = gain[np.argsort(order, kind="stable")]
    z = np.cumsum(first) / np.sqrt(np.cumsum(first**2) + 1e-12)
    return max(0.0, float(z.max(initial=0.0)))
