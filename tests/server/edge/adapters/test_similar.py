"""Groups of devices that learned alike."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import Adapter
from server.edge.adapters import Contribution, groups
from server.edge.adapters.similar import silhouettes
from tests.server.edge.adapters.samples import LARGER, adapter, contributions, like, times

EACH = 6


def task(seed: int) -> Adapter:
    """The same A for every task: devices start alike."""
    started = adapter(np.random.default_rng(0), 8, shapes=LARGER)
    return like(np.random.default_rng(seed), started, 0.0, spread=0.0)


def learned(of: Adapter, prefix: str, share: float = 0.6, devices: int = EACH, seed: int = 0) -> list[Contribution]:
    random = np.random.default_rng([seed, *prefix.encode()])
    return contributions([like(random, of, share, rank=4 + 4 * (at % 2)) for at in range(devices)], prefix=prefix)


def names(told: list[Contribution]) -> list[str]:
    return [each.device for each in told]


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_devices_of_one_task_are_one_group(tasks: int) -> None:
    told = [learned(task(at), f"task{at}") for at in range(tasks)]
    assert sorted(groups(chain(*told))) == sorted(names(each) for each in told)


@given(st.permutations(range(2 * EACH)))
@settings(max_examples=20)
def test_the_order_of_the_devices_changes_nothing(order: list[int]) -> None:
    told = learned(task(1), "one") + learned(task(2), "other")
    assert groups([told[at] for at in order]) == groups(told)


def test_one_task_is_one_group_however_many_there_could_be() -> None:
    told = learned(task(1), "device", devices=15)
    assert groups(told) == [names(told)]


def test_devices_that_have_nothing_in_common_are_one_group_for_want_of_a_better_one() -> None:
    random = np.random.default_rng(0)
    told = contributions([adapter(random, 8, shapes=LARGER) for _ in range(10)])
    assert groups(told) == [names(told)]


def test_where_b_is_not_shared_all_are_one_group() -> None:
    told = contributions([times(task(at), 0.0) for at in range(8)])
    assert groups(told) == [names(told)]


def test_a_device_that_fits_nowhere_joins_none() -> None:
    told = learned(task(1), "one") + learned(task(2), "other")
    alone = contributions([task(3)], prefix="alone")
    found = groups(told + alone)
    assert sorted(found) == sorted([names(told[:EACH]), names(told[EACH:])])
    assert groups(told + alone, found) == found  # nor in the next round


def test_devices_that_adapt_different_matrices_can_be_told_apart() -> None:
    names_of = [list(LARGER)[:4], list(LARGER)[4:]]
    told = []
    for at, of in enumerate(names_of):
        whole = task(1)
        part = Adapter(whole.model, whole.architecture, whole.alpha, {name: whole.factors[name] for name in of})
        told += learned(part, f"part{at}")
    assert len(groups(told)) == 2


@pytest.mark.parametrize("devices", [0, 1, 3])
def test_few_devices_are_one_group(devices: int) -> None:
    told = contributions([task(at) for at in range(devices)])
    assert groups(told) == ([names(told)] if devices else [])


def test_groups_keep_their_place_from_round_to_round() -> None:
    tasks = [task(1), task(2), task(3)]
    first = [names(learned(of, f"task{at}")) for at, of in enumerate(tasks)]
    before = [first[2], first[0], first[1]]
    later = [*chain(*(learned(of, f"task{at}", seed=1) for at, of in enumerate(tasks)))]
    assert groups(later, before) == before
    gone = [each for each in later if each.device != first[0][0]]
    assert groups(gone, before) == [first[2], first[0][1:], first[1]]


def test_new_groups_come_last_and_new_devices_join_theirs() -> None:
    one, other = learned(task(1), "one"), learned(task(2), "other")
    third, more = learned(task(3), "a-third"), learned(task(2), "a-new", devices=2)
    found = groups(one + other + third + more, [names(other), names(one)])
    assert found == [sorted(names(other) + names(more)), names(one), names(third)]


def test_groups_stay_where_new_ones_would_be_little_better_and_go_where_they_are_wrong() -> None:
    told = learned(task(1), "one") + learned(task(2), "other")
    everyone = names(told)
    little_moved = [[*everyone[1:EACH]], [everyone[0], *everyone[EACH:]]]
    assert groups(told) != little_moved
    assert groups(told, groups(told)) == groups(told)
    mixed = [everyone[::2], everyone[1::2]]
    assert sorted(groups(told, mixed)) == sorted([everyone[:EACH], everyone[EACH:]])


def test_a_weak_structure_makes_no_groups_and_breaks_none() -> None:
    """Between STRUCTURE - STAYS and STRUCTURE + STAYS what is there stays there."""
    shares = [share for share in np.linspace(0.2, 0.6, 21) if _kept_both_ways(float(share))]
    assert shares


def _kept_both_ways(share: float) -> bool:
    told = learned(task(1), "one", share) + learned(task(2), "other", share)
    apart, together = [names(told[:EACH]), names(told[EACH:])], [names(told)]
    return groups(told, apart) == apart and groups(told, together) == together


def test_silhouettes_are_those_of_the_definition() -> None:
    points = np.array([0.0, 1.0, 10.0, 12.0, 40.0])
    apart = np.abs(points[:, None] - points[None, :])
    values = silhouettes(apart, np.array([0, 0, 3, 3, -1]))
    expected = [(11 - 1) / 11, (10 - 1) / 10, (9.5 - 2) / 9.5, (11.5 - 2) / 11.5, 0.0]
    np.testing.assert_allclose(values, expected)
