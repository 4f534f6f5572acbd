"""U-HLM's thresholds (Oh et al., arXiv 2412.12687): beta is taken to be linear in u, and solved for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.learn.sample import Sample

_RIDGE = 1e-3  # variance of u that is added: the line of a few equal u is flat


@dataclass(frozen=True, slots=True)
class Line:
    """beta = a u + b. `delta`: P(y_d < x_d), how often the LLM finds the draft less likely than the SLM does."""

    a: float
    b: float
    delta: float

    @classmethod
    def fit(cls, sample: Sample) -> Line:
        """Least squares, weighted by inverse propensity. Flat at 0 without a sample."""
        if not len(sample):
            return cls(0.0, 0.0, 0.0)
        weights = sample.weights()
        weights = weights / weights.sum()
        u, beta = float((weights * sample.u).sum()), float((weights * sample.beta).sum())
        spread = float((weights * (sample.u - u) ** 2).sum())
        a = float((weights * (sample.u - u) * (sample.beta - beta)).sum()) / (spread + _RIDGE / len(sample))
        return cls(a, beta - a * u, float(weights[sample.beta > 0.0].sum()))

    def averse(self) -> float:
        """Risk-averse: where the line says that nothing is rejected."""
        return self.crosses(0.0)

    def prone(self) -> float:
        """Risk-prone: where it says that drafts are rejected with probability delta."""
        return self.crosses(self.delta)

    def crosses(self, level: float) -> float:
        """The u at which beta = `level`, clipped to [0, 1]; of a line that does not rise, the better end."""
        if self.a <= 0.0:
            return 0.0 if self.a * 0.5 + self.b > level else 1.0
        return float(np.clip((level - self.b) / self.a, 0.0, 1.0))
