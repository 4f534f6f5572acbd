"""Token buckets."""

from __future__ import annotations

import math

from protocol.limits import Bucket, Buckets


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    bucket = Bucket(2.0, 5.0, clock)
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]
    assert bucket.seconds_until(1.0) == 0.5
    clock.now += 0.5
    assert bucket.take()
    assert not bucket.take()
    clock.now += 1e9
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]


def test_what_never_fits_is_told_apart_from_what_fits_later() -> None:
    assert math.isinf(Bucket(1.0, 5.0, Clock()).seconds_until(6.0))
    assert Bucket(0.0, 5.0, Clock()).seconds_until(5.0) == 0.0


def test_a_clock_that_jumps_back_takes_nothing_away() -> None:
    clock = Clock()
    bucket = Bucket(1.0, 2.0, clock)
    clock.now -= 50.0
    assert bucket.take()
    assert bucket.take()
    clock.now += 1.0
    assert bucket.take()


def test_each_name_has_its_own_and_the_last_used_are_remembered() -> None:
    buckets = Buckets(0.0, 1.0, Clock(), most=2)
    assert buckets.take("a")
    assert buckets.take("b")
    assert not buckets.take("a")
    assert buckets.take("c")  # forgets b
    assert not buckets.take("a")
    assert buckets.take("b")
