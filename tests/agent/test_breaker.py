"""The circuit breaker on a clock of its own."""

from __future__ import annotations

import threading

import pytest

from agent.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def build(clock: Clock, jitter: float = 0.5, **options: float) -> Breaker:
    return Breaker(clock, lambda: jitter, **options)  # type: ignore[arg-type]


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.failure()


def test_opens_after_failures_in_a_row(clock: Clock) -> None:
    breaker = build(clock, limit=3)
    fail(breaker, 2)
    assert breaker.state == "closed"
    assert breaker.allows()
    breaker.failure()
    assert breaker.state == "open"
    assert not breaker.allows()
    assert breaker.opened == 1


def test_one_success_begins_the_count_anew(clock: Clock) -> None:
    breaker = build(clock, limit=3)
    for _ in range(5):
        fail(breaker, 2)
        breaker.success()
    assert breaker.state == "closed"
    assert breaker.opened == 0


def test_one_trial_after_the_pause(clock: Clock) -> None:
    breaker = build(clock, pause=1.0)
    fail(breaker, 3)
    clock.now += 0.999
    assert not breaker.allows()
    clock.now += 0.001
    assert breaker.state == "half_open"
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    assert breaker.state == "half_open"


def test_a_good_trial_closes(clock: Clock) -> None:
    breaker = build(clock, limit=3)
    fail(breaker, 3)
    clock.now += 1.0
    assert breaker.allows()
    breaker.success()
    assert breaker.state == "closed"
    assert all(breaker.allows() for _ in range(5))
    fail(breaker, 2)
    assert breaker.state == "closed"


def test_a_bad_trial_doubles_the_pause_up_to_the_longest(clock: Clock) -> None:
    breaker = build(clock, pause=1.0, longest=5.0)
    fail(breaker, 3)
    pauses = []
    for _ in range(5):
        began = clock.now
        while breaker.state == "open":
            clock.now += 0.25
        pauses.append(clock.now - began)
        assert breaker.allows()
        breaker.failure()
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert breaker.opened == 6


def test_after_a_recovery_the_pause_is_short_again(clock: Clock) -> None:
    breaker = build(clock, pause=1.0)
    fail(breaker, 3)
    for _ in range(4):
        clock.now += 60.0
        assert breaker.allows()
        breaker.failure()
    clock.now += 60.0
    assert breaker.allows()
    breaker.success()
    fail(breaker, 3)
    clock.now += 1.0
    assert breaker.allows()


@pytest.mark.parametrize(("jitter", "pause"), [(0.0, 0.5), (0.5, 1.0), (0.75, 1.25)])
def test_jitter_spreads_the_pause(clock: Clock, jitter: float, pause: float) -> None:
    breaker = build(clock, jitter, pause=1.0)
    fail(breaker, 3)
    clock.now += pause - 0.125
    assert not breaker.allows()
    clock.now += 0.125
    assert breaker.allows()


def test_stragglers_do_not_prolong_the_pause(clock: Clock) -> None:
    breaker = build(clock, pause=1.0)
    fail(breaker, 3)
    clock.now += 0.9
    fail(breaker, 10)
    clock.now += 0.1
    assert breaker.allows()
    assert breaker.opened == 1


def test_a_late_success_closes_it(clock: Clock) -> None:
    breaker = build(clock)
    fail(breaker, 3)
    breaker.success()
    assert breaker.allows()


def test_an_abandoned_trial_is_passed_on(clock: Clock) -> None:
    breaker = build(clock)
    fail(breaker, 3)
    clock.now += 1.0
    assert breaker.allows()
    breaker.abandoned()
    assert breaker.state == "half_open"
    assert [breaker.allows() for _ in range(2)] == [True, False]


def test_abandoning_changes_nothing_else(clock: Clock) -> None:
    breaker = build(clock)
    breaker.abandoned()
    assert breaker.state == "closed"
    fail(breaker, 3)
    breaker.abandoned()
    assert breaker.state == "open"
    assert not breaker.allows()


def test_of_many_threads_one_gets_the_trial(clock: Clock) -> None:
    breaker = build(clock)
    fail(breaker, 3)
    clock.now += 1.0
    allowed: list[bool] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        allowed.append(breaker.allows())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 7 + [True]
