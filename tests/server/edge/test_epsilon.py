"""The epsilon ledger agrees with closed forms, and says plainly who is not protected."""

from __future__ import annotations

import math
import sys

import dp_accounting
import pytest
from dp_accounting import pld
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigError
from server.edge.epsilon import Releases, epsilons, spending

DELTA = 1e-5


def one(noise: float, updates: int, delta: float = DELTA) -> float:
    return epsilons([Releases("d", noise, updates)], delta)["d"]


class TestEpsilons:
    @pytest.mark.parametrize(("noise", "updates"), [(2.0, 1), (6.0, 9), (20.0, 100)])
    def test_t_updates_are_one_of_noise_over_the_root_of_t(self, noise: float, updates: int) -> None:
        """And mu = 1 costs 4.3772 at 1e-5, by the analytic Gaussian mechanism (Balle and Wang 2018)."""
        assert one(noise, updates) == pytest.approx(one(noise / math.sqrt(updates), 1), rel=1e-6)
        if 2.0 * math.sqrt(updates) / noise == 1.0:
            assert one(noise, updates) == pytest.approx(4.3772, abs=2e-3)

    @pytest.mark.parametrize("noise", [1.0, 4.0, 30.0])
    def test_it_is_at_most_what_renyi_accounting_says(self, noise: float) -> None:
        renyi = RdpAccountant()
        renyi.compose(dp_accounting.GaussianDpEvent(noise / 2.0), 25)
        assert 0.5 * renyi.get_epsilon(DELTA) < one(noise, 25) <= renyi.get_epsilon(DELTA)

    def test_changing_the_noise_costs_what_the_library_composes(self) -> None:
        accountant = pld.PLDAccountant()
        for noise, updates in ((4.0, 3), (9.0, 20), (2.5, 1)):
            accountant.compose(dp_accounting.GaussianDpEvent(noise / 2.0), updates)
        told = [Releases("d", 4.0, 3), Releases("d", 9.0, 20), Releases("d", 2.5, 1)]
        assert epsilons(told, DELTA)["d"] == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)

    @settings(max_examples=20, deadline=None)
    @given(noise=st.floats(0.5, 50), updates=st.integers(1, 500))
    def test_more_rounds_and_less_noise_cost_more(self, noise: float, updates: int) -> None:
        cost = one(noise, updates)
        assert 0.0 < cost < math.inf
        assert one(noise, 2 * updates) > cost
        assert one(0.8 * noise, updates) > cost

    def test_hardly_any_noise_is_none(self) -> None:
        assert 5_000 < one(0.02, 1) < 6_000
        assert one(0.01, 1) == one(1e-9, 10**9) == math.inf

    def test_no_noise_is_no_protection(self) -> None:
        told = [Releases("a", 0.0, 1), Releases("b", 4.0, 5), Releases("b", 0.0, 1), Releases("c", 0.0, 0)]
        assert epsilons(told, DELTA) == {"a": math.inf, "b": math.inf, "c": 0.0}

    @pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
    def test_an_impossible_delta(self, delta: float) -> None:
        with pytest.raises(ConfigError, match="delta"):
            one(1.0, 1, delta)


class TestSpending:
    def test_worst_device_and_distribution(self) -> None:
        told = [Releases(f"d{number}", 20.0, number) for number in range(1, 101)]
        result = spending(told, DELTA)
        assert (result.devices, result.unprotected, result.delta) == (100, 0, DELTA)
        assert result.worst == ("d100", one(20.0, 100))
        assert result.quantiles == {0.5: one(20.0, 50), 0.9: one(20.0, 90), 0.99: one(20.0, 99)}

    def test_the_unprotected_are_counted(self) -> None:
        result = spending([Releases("a", 4.0, 1), Releases("b", 0.0, 3)], DELTA)
        assert (result.unprotected, result.worst) == (1, ("b", math.inf))

    def test_nobody(self) -> None:
        result = spending([], DELTA)
        assert (result.devices, result.worst, result.quantiles) == (0, None, {})


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'skerry\[server\]'"):
        one(3.14159, 1)
