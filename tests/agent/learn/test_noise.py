"""Clipping, noise and what they cost: what leaves the device depends on its data no more than was promised."""

from __future__ import annotations

import math
import random

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from agent.learn.noise import released, spent
from protocol.errors import ConfigError
from protocol.rounds import Update

SUBJECT = "00112233445566aa"


def exact(threshold: float) -> Update:
    return Update(7, 3, SUBJECT, threshold, 123.0, [0.1, 0.2, 0.3])


class TestReleased:
    def test_it_is_what_was_agreed_and_the_clipped_difference_and_noise(self) -> None:
        shown = released(exact(0.52), 0.5, 0.1, 4.0, 0.25)
        assert shown.threshold == pytest.approx(0.5 + 0.02 + 4.0 * 0.1 * 0.25, abs=1e-6)
        assert (shown.round, shown.base, shown.subject, shown.clip, shown.noise) == (7, 3, SUBJECT, 0.1, 4.0)

    def test_evidence_and_statistics_do_not_leave(self) -> None:
        shown = released(exact(0.5), 0.5, 0.1, 4.0, 0.0)
        assert (shown.evidence, shown.statistics) == (1.0, None)

    @given(
        one=st.floats(0, 1),
        other=st.floats(0, 1),
        agreed=st.floats(0, 1),
        clip=st.floats(1e-3, 1),
        draw=st.floats(-9, 9),
    )
    def test_two_devices_differ_by_the_sensitivity_at_most(
        self, one: float, other: float, agreed: float, clip: float, draw: float
    ) -> None:
        shown = [released(exact(own), agreed, clip, 2.0, draw).threshold for own in (one, other)]
        assert abs(shown[0] - shown[1]) <= 2.0 * clip + 2.0**-19
        assert all(0.0 <= each <= 1.0 for each in shown)

    @given(draw=st.floats(-40, 40), threshold=st.floats(0, 1))
    def test_low_bits_are_taken_away(self, draw: float, threshold: float) -> None:
        assert (released(exact(threshold), 0.5, 0.1, 1.0, draw).threshold * 2**20).is_integer()

    def test_the_noise_has_the_promised_size(self) -> None:
        gauss = random.Random(1).gauss
        shown = [released(exact(0.5), 0.5, 0.01, 8.0, gauss()).threshold for _ in range(4000)]
        mean = sum(shown) / len(shown)
        assert mean == pytest.approx(0.5, abs=4 * 0.08 / math.sqrt(4000))
        assert math.sqrt(sum((each - mean) ** 2 for each in shown) / 4000) == pytest.approx(0.08, rel=0.05)

    @pytest.mark.parametrize(("clip", "noise"), [(0.0, 1.0), (-0.1, 1.0), (1.5, 1.0), (math.nan, 1.0)])
    def test_a_clip_that_protects_nothing(self, clip: float, noise: float) -> None:
        with pytest.raises(ConfigError, match="clip"):
            released(exact(0.5), 0.5, clip, noise, 0.0)

    @pytest.mark.parametrize("noise", [0.0, -1.0, math.inf, math.nan])
    def test_noise_that_hides_nothing(self, noise: float) -> None:
        with pytest.raises(ConfigError, match="hides nothing"):
            released(exact(0.5), 0.5, 0.1, noise, 0.0)
        with pytest.raises(ConfigError, match="hides nothing"):
            spent(noise, 1, 1e-5)


class TestSpent:
    @pytest.mark.parametrize("noise", [0.5, 2.0, 8.0, 60.0])
    @pytest.mark.parametrize("releases", [1, 10, 1000])
    @pytest.mark.parametrize("delta", [1e-3, 1e-6])
    def test_it_agrees_with_dp_accounting(self, noise: float, releases: int, delta: float) -> None:
        mu = 2.0 * math.sqrt(releases) / noise
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4 * max(1.0, mu * mu))
        accountant.compose(dp_accounting.GaussianDpEvent(noise / 2.0), releases)
        assert spent(noise, releases, delta) == pytest.approx(accountant.get_epsilon(delta), rel=2e-3, abs=2e-4)

    @given(noise=st.floats(0.3, 100), releases=st.integers(1, 200), delta=st.floats(1e-9, 0.1))
    def test_it_solves_the_analytic_gaussian_mechanism(self, noise: float, releases: int, delta: float) -> None:
        """Balle and Wang, theorem 8, by another implementation of the normal distribution."""
        mu, epsilon = 2.0 * math.sqrt(releases) / noise, spent(noise, releases, delta)

        def failure(e: float) -> float:
            return float(norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu)))

        assert failure(epsilon) <= delta * (1 + 1e-5) + 1e-14
        assert epsilon == 0.0 or failure(epsilon * (1 - 1e-6) - 1e-9) >= delta * (1 - 1e-4) - 1e-14

    @given(noise=st.floats(0.05, 1e3), releases=st.integers(1, 10_000))
    def test_more_rounds_and_less_noise_cost_more(self, noise: float, releases: int) -> None:
        cost = spent(noise, releases, 1e-5)
        assert spent(noise, releases + 1, 1e-5) >= cost
        assert spent(noise * 0.9, releases, 1e-5) >= cost
        assert spent(noise, releases, 1e-6) >= cost

    @pytest.mark.parametrize("noise", [1e-3, 0.02, 0.1])
    def test_with_hardly_any_noise_it_is_large_and_finite(self, noise: float) -> None:
        mu = 2.0 / noise
        assert mu * mu / 2 < spent(noise, 1, 1e-5) < math.inf

    def test_nothing_sent_costs_nothing(self) -> None:
        assert spent(1.0, 0, 1e-5) == 0.0

    def test_known_value(self) -> None:
        """mu = 1 at delta 1e-5: epsilon 4.3772 (Balle and Wang's own code for sensitivity 1, sigma 1)."""
        assert spent(2.0, 1, 1e-5) == pytest.approx(4.3772, abs=1e-3)

    @pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
    def test_an_impossible_delta(self, delta: float) -> None:
        with pytest.raises(ConfigError, match="delta"):
            spent(1.0, 1, delta)
