"""Noise that hides, before anything leaves the device, what one update says of the device's data.

What is protected: the whole of one device's contribution to one round (local differential privacy at the level of the
device, so against the edge too). Two inputs are neighbours if they differ in everything that the device has ever seen.
The threshold's distance from what was agreed is clipped to [-clip, clip], so it differs between neighbours by at most
2 * clip (the sensitivity); Gaussian noise of standard deviation noise * clip is noise / 2 sensitivities. T such updates
together are mu-Gaussian differentially private with mu = 2 sqrt(T) / noise (Dong, Roth and Su, "Gaussian Differential
Privacy", JRSS B 84, 2022, corollary 3.3), though each is relative to what was agreed after the ones before.

What was agreed is public; evidence and statistics are replaced by constants, since they would leak. Not protected:
that the device takes part, when, and for which subject.

The draw must be unpredictable: whoever can guess it subtracts it. `random.SystemRandom().gauss` is fine; a Mersenne
Twister's state can be computed from its outputs. Mironov ("On significance of the least significant bits for
differential privacy", CCS 2012, DOI 10.1145/2382196.2382264) shows that the low bits of noise in floating point give
values away. So the result is rounded to multiples of 2^-20 and clipped to [0, 1], in the manner of his snapping
mechanism. That takes away the bits which his attack reads; it is no proof, and the figures below are those of real
numbers.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from protocol.errors import ConfigError
from protocol.rounds import Update

_GRID = 1 << 20
_FAR = 25.0  # where erfc's asymptotic series is exact to 1e-6, and erfc itself soon underflows


def released(update: Update, agreed: float, clip: float, noise: float, draw: float) -> Update:
    """`update` as it may be sent. `agreed`: the threshold that all know; `draw`: standard normal, used once, for this
    alone. Raises ConfigError if `clip` or `noise` are not positive and finite."""
    _check(noise)
    if not 0.0 < clip <= 1.0:
        raise ConfigError(f"a clip of {clip} protects nothing or clips nothing: choose more than 0, and at most 1")
    difference = min(max(update.threshold - agreed, -clip), clip)
    noisy = agreed + difference + noise * clip * draw
    shown = round(min(max(noisy, 0.0), 1.0) * _GRID) / _GRID
    return replace(update, threshold=shown, evidence=1.0, statistics=None, clip=clip, noise=noise)


def spent(noise: float, releases: float, delta: float) -> float:
    """Epsilon at `delta` after so many updates (those with other noise count as `releases_with` says): the least e with

        Phi(mu / 2 - e / mu) - exp(e) Phi(-mu / 2 - e / mu) <= delta,    mu = 2 sqrt(releases) / noise

    which is exact for the Gaussian mechanism (Balle and Wang, arXiv 1805.06530, theorem 8) and for what is composed of
    it. Raises ConfigError if `noise` is not positive or `delta` is not in (0, 1)."""
    _check(noise)
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta = {delta} is no probability of failure: choose one below 1 / devices, 1e-5 say")
    mu = 2.0 * math.sqrt(max(releases, 0.0)) / noise
    if mu == 0.0 or _delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, mu * mu / 2.0 + mu * math.sqrt(2.0 * math.log(1.0 / delta))  # enough: Bun and Steinke 2016, 1.3
    for _ in range(100):
        middle = (low + high) / 2.0
        if _delta(middle, mu) > delta:
            low = middle
        else:
            high = middle
    return high


def releases_with(noise: float, leaked: float) -> float:
    """How many updates with this noise tell as much as those of which 1 / noise^2 adds up to `leaked`: mu^2 adds up."""
    return leaked * noise * noise


def _delta(epsilon: float, mu: float) -> float:
    gain = math.exp(_log_phi(mu / 2.0 - epsilon / mu))
    loss = math.exp(min(epsilon + _log_phi(-mu / 2.0 - epsilon / mu), 0.0))
    return gain - loss


def _log_phi(x: float) -> float:
    """The logarithm of the standard normal distribution function."""
    z = -x / math.sqrt(2.0)
    if z < _FAR:
        return math.log(math.erfc(z) / 2.0)
    return -z * z - math.log(2.0 * z * math.sqrt(math.pi)) + math.log1p(-1.0 / (2.0 * z * z))


def _check(noise: float) -> None:
    if not 0.0 < noise < math.inf:
        raise ConfigError(f"noise of {noise} hides nothing: choose a positive multiple of the clip, 4 say")
