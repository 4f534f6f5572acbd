"""The thread governor on a simulated machine: time is what the model of it says, nothing is measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from models.engine.threads import ThreadGovernor, physical_cores

ONE = 0.020  # seconds of a step with one thread


class Machine:
    """`cores` cores, of which `busy` belong to somebody else. A thread that shares its core slows all down, the more
    the higher `collapse`."""

    def __init__(self, cores: int, *, busy: int = 0, collapse: float = 5.0, noise: float = 0.05) -> None:
        self.cores = cores
        self.busy = busy
        self.collapse = collapse
        self._noise = noise
        self._random = random.Random(4)

    def step(self, threads: int) -> float:
        """Seconds of one step: part of it cannot be shared out."""
        seconds = ONE * (0.1 + 0.9 / threads)
        if threads > max(1, self.cores - self.busy):
            seconds = ONE * self.collapse
        return seconds * self._random.uniform(1.0 - self._noise, 1.0 + self._noise)

    def best(self) -> float:
        return min(ONE * (0.1 + 0.9 / threads) for threads in range(1, max(1, self.cores - self.busy) + 1))


def build(limit: int) -> ThreadGovernor:
    return ThreadGovernor(limit, lambda: 0)


def run(governor: ThreadGovernor, machine: Machine, steps: int) -> tuple[list[int], float]:
    """The thread counts used and the time that it took."""
    used: list[int] = []
    seconds = 0.0
    for _ in range(steps):
        used.append(governor.count)
        took = machine.step(governor.count)
        seconds += took
        governor.observe(took)
    return used, seconds


def changes(used: list[int]) -> int:
    return sum(a != b for a, b in pairwise(used))


@pytest.mark.parametrize("cores", [1, 2, 4, 8])
def test_uses_all_cores_when_they_are_free(cores: int) -> None:
    used, seconds = run(build(cores), Machine(cores), 2000)
    assert used.count(cores) / len(used) > 0.95
    assert seconds < 1.05 * 2000 * Machine(cores).best()


@pytest.mark.parametrize("collapse", [1.5, 5.0, 40.0])
def test_settles_on_fewer_when_steps_collapse(collapse: float) -> None:
    machine, governor = Machine(2, collapse=collapse), build(2)
    run(governor, machine, 300)
    machine.busy = 1
    used, _ = run(governor, machine, 40)
    assert set(used[-20:]) == {1}


@pytest.mark.parametrize("busy", [1, 2, 3])
def test_settles_on_the_cores_that_are_left(busy: int) -> None:
    machine, governor = Machine(4), build(4)
    run(governor, machine, 300)
    machine.busy = busy
    used, _ = run(governor, machine, 400)
    assert max(set(used), key=used.count) == 4 - busy


def test_starts_right_on_a_busy_machine() -> None:
    used, _ = run(build(2), Machine(2, busy=1), 100)
    assert used.count(1) > 85


def test_returns_to_more_when_they_are_free_again() -> None:
    machine, governor = Machine(4, busy=2), build(4)
    run(governor, machine, 300)
    assert governor.count < 4
    machine.busy = 0
    used, _ = run(governor, machine, 1500)
    assert set(used[-50:]) == {4}


@pytest.mark.parametrize("collapse", [2.0, 5.0, 40.0])
def test_trials_of_more_cost_little(collapse: float) -> None:
    machine, governor = Machine(2, busy=1, collapse=collapse), build(2)
    run(governor, machine, 20)
    _, seconds = run(governor, machine, 3000)
    assert seconds < 3000 * ONE / 0.8


def test_trials_become_rare() -> None:
    machine, governor = Machine(2, busy=1), build(2)
    run(governor, machine, 3000)
    used, _ = run(governor, machine, 3000)
    assert changes(used) <= 8


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.25])
def test_does_not_flap(noise: float) -> None:
    used, _ = run(build(4), Machine(4, noise=noise), 5000)
    assert changes(used) < 60
    assert used.count(4) / len(used) > 0.9


def test_one_slow_step_is_nothing() -> None:
    machine, governor = Machine(2), build(2)
    run(governor, machine, 200)
    for _ in range(20):
        governor.observe(3.0)
        used, _ = run(governor, machine, 30)
        assert set(used) == {2}


def test_growing_steps_are_not_somebody_elses_work() -> None:
    governor = build(2)
    machine = Machine(2, noise=0.0)
    used = []
    for step in range(4000):
        used.append(governor.count)
        governor.observe(machine.step(governor.count) * (1.0 + step / 2000))
    assert used.count(2) / len(used) > 0.97


def test_a_trial_that_failed_once_does_not_end_them() -> None:
    """A time in which fewer threads do not help must not make it deaf to a later one in which they do."""
    governor = build(2)
    machine = Machine(2)
    run(governor, machine, 200)
    for _ in range(60):  # everything is slow, whatever the thread count
        governor.observe(0.5)
    run(governor, machine, 300)
    assert governor.count == 2
    machine.busy = 1
    used, _ = run(governor, machine, 60)
    assert set(used[-20:]) == {1}


def test_never_leaves_its_limits() -> None:
    dice = random.Random(1)
    governor = build(4)
    for _ in range(20_000):
        assert 1 <= governor.observe(dice.choice([1e-4, 0.01, 0.02, 1.0, 30.0])) <= 4


def test_one_thread_stays_one() -> None:
    used, _ = run(build(1), Machine(1, busy=1), 500)
    assert set(used) == {1}


@pytest.mark.parametrize(("others", "wanted"), [(0, 99), (1000, 1)])
def test_a_prompt_takes_the_cores_that_are_free(others: int, wanted: int) -> None:
    governor = ThreadGovernor(99, lambda: others)
    assert governor.for_prompt() == min(wanted, max(1, physical_cores() - others))
    assert governor.count == governor.for_prompt()


def test_a_later_prompt_leaves_the_steps_alone() -> None:
    asked: list[Callable[[], int]] = []
    governor = ThreadGovernor(2, lambda: 1000 if asked else 0)
    run(governor, Machine(2), 100)
    before = governor.count
    asked.append(physical_cores)
    assert governor.for_prompt() == 1
    assert governor.count == before
