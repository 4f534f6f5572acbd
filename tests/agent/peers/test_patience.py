"""How long peers are waited for, and whether they are asked at all."""

from __future__ import annotations

import numpy as np
import pytest

from agent.peers.patience import RoundTrip, Worth


class TestRoundTrip:
    def test_the_cap_holds_before_anything_is_known(self) -> None:
        assert RoundTrip(0.002, 0.05).deadline == 0.05

    def test_the_first_sample_counts_as_in_rfc_6298(self) -> None:
        trip = RoundTrip(0.0, 10.0)
        trip.observe(1.0)
        assert (trip.smoothed, trip.deviation, trip.deadline) == (1.0, 0.5, 3.0)
        trip.observe(2.0)
        assert (trip.smoothed, trip.deviation) == (1.125, 0.625)

    @pytest.mark.parametrize("typical", [0.001, 0.004, 0.02])
    def test_nearly_all_answers_come_in_time(self, typical: float) -> None:
        rng, trip = np.random.default_rng(0), RoundTrip(0.0, 1.0)
        late = 0
        for seconds in typical * rng.gamma(4.0, 0.25, 2000):
            late += seconds > trip.deadline
            trip.observe(seconds)
        assert late < 60  # 3 %
        assert trip.deadline < 6 * typical

    def test_it_follows_when_the_network_changes(self) -> None:
        trip = RoundTrip(0.002, 1.0)
        for seconds in [0.001] * 50 + [0.1] * 50:
            trip.observe(seconds)
        assert 0.1 < trip.deadline < 0.3
        for seconds in [0.001] * 50:
            trip.observe(seconds)
        assert trip.deadline < 0.02

    def test_floor_and_cap_hold(self) -> None:
        trip = RoundTrip(0.002, 0.05)
        for _ in range(50):
            trip.observe(0.00001)
        assert trip.deadline == 0.002
        for _ in range(50):
            trip.observe(9.0)
        assert trip.deadline == 0.05


class TestWorth:
    @staticmethod
    def asked(worth: Worth, questions: int, *, helped: bool = False) -> int:
        """How many of the questions are asked, if none of them, or each, is of use."""
        asked = 0
        for _ in range(questions):
            if worth.asking({"lamp"}):
                asked += 1
                worth.outcome(helped=helped)
        return asked

    def test_useless_questions_get_rare_and_never_end(self) -> None:
        worth = Worth(np.random.default_rng(0).random)
        assert self.asked(worth, 8) == 8
        first, later, last = (self.asked(worth, 2000) for _ in range(3))
        assert 500 > first > later
        assert last >= 10

    def test_one_that_helps_brings_them_back(self) -> None:
        worth = Worth(np.random.default_rng(0).random)
        self.asked(worth, 2000)
        worth.outcome(helped=True)
        assert self.asked(worth, 8) == 8

    def test_so_does_somebody_new(self) -> None:
        worth = Worth(lambda: 0.999)
        self.asked(worth, 100)
        assert not worth.asking({"lamp"})
        assert worth.asking({"lamp", "fridge"})
        self.asked(worth, 100)
        assert not worth.asking({"lamp"})  # and somebody who leaves does not
        assert not worth.asking({"lamp"})

    def test_as_long_as_they_help_all_are_asked(self) -> None:
        assert self.asked(Worth(lambda: 0.999), 1000, helped=True) == 1000
