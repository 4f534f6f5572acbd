"""How unsure the SLM is of one step: a score u in [0, 1] from its distribution x, shape (V,).

entropy           H(x) / ln V, with H = -sum x ln x (FedHLM, arXiv 2507.00082, abstract)
margin            1 - (x_1 - x_2), the two likeliest tokens (Scheffer et al., 2001)
max_probability   (1 - x_1) V / (V - 1) (Hendrycks and Gimpel, 2017)
temperature       share of K = 20 draws at temperatures 0 to 2 that differ from the draft (U-HLM, arXiv 2412.12687)

Always at temperature 1 and without penalties: what the model believes, not how the request wants it sampled.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models.sampling import FLOOR, shifted

Floats = NDArray[np.float32]
Measure = Literal["entropy", "margin", "max_probability", "temperature"]
MEASURES: tuple[str, ...] = get_args(Measure)

PERTURBATIONS = 20  # U-HLM's K
_MASK = (1 << 64) - 1  # numpy takes no negative seeds
_BLOCK = 512  # most terms that are added up naively
_LOW, _HIGH = -30.0, 32.0  # a peak in between leaves exp and the sums well within float32
_TEMPERATURES = np.linspace(0.0, 2.0, PERTURBATIONS)[1:]  # the first, 0, draws the likeliest token


class Softmax:
    """x of one step, in a buffer that the next step reuses, with as few passes over V as possible: after a forward pass
    everything is cold, so each pass costs what reading memory costs. Valid until the engine's next forward."""

    def __init__(self, vocab: int) -> None:
        self._e = np.empty(vocab, np.float32)
        self._z = self._e  # logits, up to a constant; e = exp(z)
        self._total = 1.0
        self.likeliest = 0
        block = math.gcd(vocab, _BLOCK)
        self._rows = (vocab // block, block)
        self._e_rows = self._e.reshape(self._rows)

    def load(self, logits: Floats) -> Softmax:
        """Takes over `logits` (V,). Raises ValueError if they are NaN or all -inf."""
        self.likeliest = int(logits.argmax())
        # Softmax does not mind a constant, and float32's exp does not mind this range: no pass to subtract the peak.
        direct = _LOW < float(logits[self.likeliest]) < _HIGH
        self._z = logits if direct else shifted(logits)
        np.exp(self._z, out=self._e)
        self._total = float(np.einsum("ij->i", self._e_rows).sum())
        return self

    def p(self, token: int) -> float:
        return float(self._e[token]) / self._total

    def log_p(self, token: int) -> float:
        return float(self._z[token]) - math.log(self._total)

    def log_total(self, logits: Floats) -> float:
        """The logarithm of the sum of exp(logits), for the `logits` (V,) that were loaded or a copy of them."""
        return float(logits[self.likeliest]) - self.log_p(self.likeliest)

    def log_all(self) -> Floats:
        """(V,) log-probabilities, finite, a new array."""
        log_p: Floats = self._z - np.float32(math.log(self._total))
        return np.maximum(log_p, FLOOR, out=log_p)

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
        mean = self._mean_z() / self._total
        if math.isnan(mean):  # 0 * -inf
            self._z = np.maximum(self._z, FLOOR)
            mean = self._mean_z() / self._total
        return (math.log(self._total) - mean) / math.log(len(self._z))

    def _mean_z(self) -> float:
        """The sum of e z. Not np.dot: BLAS would start threads that spin on the cores which the model needs. By rows,
        because einsum adds up naively."""
        return float(np.einsum("ij,ij->i", self._e_rows, self._z.reshape(self._rows)).sum())

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
        with np.errstate(over="ignore"):  # -inf is right for what is hopelessly unlikely
            scaled = (self._z - self._z[self.likeliest])[None, :] / _TEMPERATURES[:, None].astype(np.float32)
        draft_p = np.exp(scaled[:, draft]) / np.exp(scaled, out=scaled).sum(axis=1)
        differs = int((uniforms[1:] >= draft_p).sum()) + int(draft != self.likeliest)
        return differs / PERTURBATIONS
