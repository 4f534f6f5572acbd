"""How unsure the SLM is of one step: a score u in [0, 1] from its distribution x, shape (V,).

entropy           H(x) / ln V, with H = -sum x ln x (FedHLM, arXiv 2507.00082, abstract)
margin            1 - (x_1 - x_2), the two likeliest tokens (Scheffer et al., 2001)
max_probability   (1 - x_1) V / (V - 1) (Hendrycks and Gimpel, 2017)
temperature       share of K = 20 draws at temperatures 0 to 2 that differ from the draft (U-HLM, arXiv 2412.12687)

Always at temperature 1 and without penalties: what the model believes, not how the request wants it sampled.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models.sampling import FLOOR, shifted

Floats = NDArray[np.float32]
Measure = Literal["entropy", "margin", "max_probability", "temperature"]
MEASURES: tuple[str, ...] = get_args(Measure)

PERTURBATIONS = 20  # U-HLM's K
_MASK = (1 << 64) - 1  # numpy takes no negative seeds
_TEMPERATURES = np.linspace(0.0, 2.0, PERTURBATIONS)[1:]  # the first, 0, draws the likeliest token


class Softmax:
    """x of one step, in buffers that the next step reuses: one pass of exp over V, no allocation."""

    def __init__(self, vocab: int) -> None:
        self._z = np.empty(vocab, np.float32)
        self._e = np.empty(vocab, np.float32)
        self._total = 1.0
        self.likeliest = 0

    def load(self, logits: Floats) -> Softmax:
        """Takes over `logits` (V,). Raises ValueError if they are NaN or all -inf."""
        self.likeliest = int(logits.argmax())
        peak = logits[self.likeliest]
        if np.isfinite(peak):
            np.subtract(logits, peak, out=self._z)
        else:
            self._z = shifted(logits)
        np.exp(self._z, out=self._e)
        self._total = float(self._e.sum())
        return self

    def p(self, token: int) -> float:
        return float(self._e[token]) / self._total

    def log_p(self, token: int) -> float:
        return float(self._z[token]) - float(np.log(self._total))

    def log_all(self) -> Floats:
        """(V,) log-probabilities, finite, a new array."""
        return np.maximum(self._z, FLOOR) - np.float32(np.log(self._total))

    def uncertainty(self, measure: Measure, draft: int, seed: int, position: int) -> float:
        """u by `measure`. `draft`, `seed` and `position` matter to `temperature` alone."""
        match measure:
            case "entropy":
                u = self.entropy()
            case "margin":
                u = self.margin()
            case "max_probability":
                u = self.max_probability()
            case "temperature":
                u = self.perturbation(draft, np.random.default_rng((seed & _MASK, position)).random(PERTURBATIONS))
        return min(1.0, max(0.0, u))

    def entropy(self) -> float:
        # Not np.dot: BLAS would start threads of its own, which spin on the cores that the model needs.
        mean = float(np.einsum("i,i->", self._e, self._z)) / self._total
        if np.isnan(mean):  # 0 * -inf
            np.maximum(self._z, FLOOR, out=self._z)
            mean = float(np.einsum("i,i->", self._e, self._z)) / self._total
        return (float(np.log(self._total)) - mean) / float(np.log(len(self._z)))

    def margin(self) -> float:
        first = self._e[self.likeliest]
        self._e[self.likeliest] = -1.0
        second = self._e.max()
        self._e[self.likeliest] = first
        return 1.0 - (float(first) - float(second)) / self._total

    def max_probability(self) -> float:
        vocab = len(self._z)
        return (1.0 - float(self._e[self.likeliest]) / self._total) * vocab / (vocab - 1)

    def perturbation(self, draft: int, uniforms: NDArray[np.float64]) -> float:
        """U-HLM's measure with one uniform number per temperature, shape (K,).

        A draw at temperature t differs from the draft with probability 1 - softmax(logits / t)[draft], so that
        probability is all that has to be computed; which other token was drawn is of no interest.
        """
        scaled = self._z[None, :] / _TEMPERATURES[:, None].astype(np.float32)
        draft_p = np.exp(scaled[:, draft]) / np.exp(scaled, out=scaled).sum(axis=1)
        differs = int((uniforms[1:] >= draft_p).sum()) + int(draft != self.likeliest)
        return differs / PERTURBATIONS
