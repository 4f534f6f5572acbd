"""The epsilon ledger: how much privacy the devices have spent, as operators see it.

Each noisy update is a Gaussian mechanism of sensitivity 2 * clip and standard deviation noise * clip, on everything
that the device has seen (agent/learn/noise.py says what that protects). The edge counts them by device and noise, as
the updates state it: it can't see whether a device really adds what it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from protocol.errors import ConfigError

_QUANTILES = (0.5, 0.9, 0.99)
_MEANINGLESS = 100.0  # mu, so that epsilon is above 5,000


class Releases(NamedTuple):
    """So many updates of one device with the same `noise` (a multiple of the clip; 0: none)."""

    device: str
    noise: float
    updates: int


@dataclass(frozen=True, slots=True)
class Spending:
    """Epsilon at `delta`. `worst`: of the device that has spent most, by name; `quantiles`: by share of the devices;
    `unprotected`: devices that have sent an update without noise, or with as good as none, whose epsilon is infinite
    and is counted as that."""

    delta: float
    devices: int
    unprotected: int
    worst: tuple[str, float] | None
    quantiles: dict[float, float]


def spending(releases: Iterable[Releases], delta: float) -> Spending:
    """Raises ConfigError if `delta` is not in (0, 1) or `dp-accounting` is not installed."""
    spent = epsilons(releases, delta)
    ranked = sorted(spent.values())
    return Spending(
        delta,
        len(spent),
        sum(math.isinf(each) for each in ranked),
        max(spent.items(), key=lambda item: item[1], default=None),
        {share: ranked[math.ceil(share * len(ranked)) - 1] for share in _QUANTILES} if ranked else {},
    )


def epsilons(releases: Iterable[Releases], delta: float) -> dict[str, float]:
    """Epsilon at `delta` by device; infinite without noise, or if it is above 5,000. Raises ConfigError."""
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta = {delta} is no probability of failure: choose one below 1 / devices, 1e-5 say")
    squares: dict[str, float] = {}
    for device, noise, updates in releases:
        squares[device] = squares.get(device, 0.0) + _square(noise, updates)
    return {device: _epsilon(square, delta) for device, square in squares.items()}


def _square(noise: float, updates: int) -> float:
    if updates <= 0:
        return 0.0
    return updates / noise**2 if noise > 0.0 else math.inf


@lru_cache(maxsize=1024)
def _epsilon(square: float, delta: float) -> float:
    """Of Gaussian mechanisms with sum 1 / noise^2 = `square`. Together they are one with noise 1 / sqrt(square) (Dong,
    Roth and Su, JRSS B 84, 2022, corollary 3.3), so that a device which often changes its noise costs no more."""
    mu = 2.0 * math.sqrt(square)
    if mu == 0.0 or mu > _MEANINGLESS:
        return math.inf if mu else 0.0
    dp, pld = _accounting()
    interval = 1e-3 * mu  # of the privacy loss, whose standard deviation is mu
    accountant = pld.PLDAccountant(value_discretization_interval=interval)
    accountant.compose(dp.GaussianDpEvent(1.0 / mu))
    with np.errstate(over="ignore"):  # where epsilon is in the thousands
        return float(accountant.get_epsilon(delta))


def _accounting() -> tuple[ModuleType, ModuleType]:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError:
        raise ConfigError(
            "the epsilon ledger needs the package dp-accounting: run pip install 'skerry[server]' on the edge's machine"
        ) from None
    return dp_accounting, pld
