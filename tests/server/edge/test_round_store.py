"""What an edge keeps: each update once, a ledger of noise, and nothing that is torn."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import StoreError, StoreInUse
from protocol.folder_lock import holder
from protocol.rounds import Level, Told
from server.edge.folder import DATABASE, LOCK
from server.edge.levels import Kept
from server.edge.round_store import REMEMBERED, Entry, RoundStore
from tests.server.edge.round_fleet import OTHER, SUBJECT, update


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RoundStore]:
    store = RoundStore(tmp_path)
    yield store
    store.close()


def ended(store: RoundStore, round: int) -> None:
    with store.transaction() as state:
        state.round = round
        for subject in store.pending():
            store.counted(subject, round)
        store.forget(state)


def test_an_update_counts_once(store: RoundStore) -> None:
    assert store.accept("a", update(1)) is None
    assert store.accept("a", update(1, threshold=0.9)) == "duplicate"
    assert store.pending()[SUBJECT].thresholds.tolist() == [0.5]
    ended(store, 1)
    assert store.pending() == {}
    assert store.accept("a", update(1)) == "duplicate"
    assert store.accept("a", update(2, threshold=0.6)) is None
    assert store.accept("a", update(1, subject=OTHER)) is None
    assert store.pending()[SUBJECT].before.tolist() == [0.5]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans()), max_size=40))
def test_no_order_of_updates_and_rounds_counts_one_twice(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, int, bool]]
) -> None:
    store = RoundStore(tmp_path_factory.mktemp("kept"))
    counted: list[tuple[str, float]] = []
    for device, round, end in said:
        store.accept(device, update(round))
        if end:
            pending = store.pending().get(SUBJECT)
            counted += zip(pending.devices, pending.rounds.tolist(), strict=True) if pending else []
            ended(store, store.state.round + 1)
    assert len(counted) == len(set(counted))
    store.close()


def test_what_is_long_past_is_forgotten_and_not_taken_again(store: RoundStore) -> None:
    store.accept("a", update(1))
    ended(store, 1)
    ended(store, REMEMBERED + 2)
    assert store.state.floor == 2
    assert store.lately() == 0
    assert store.pending() == {}


SUBJECTS = [f"{number:016x}" for number in range(300)]


def test_a_device_has_a_few_subjects_at_once(store: RoundStore) -> None:
    assert [store.accept("a", update(1, subject=each)) for each in SUBJECTS[:9]] == [None] * 8 + ["subjects"]
    assert store.accept("a", update(2, subject=SUBJECTS[0])) is None  # those that it has go on


def test_a_device_may_change_its_subject_again_and_again(store: RoundStore) -> None:
    for round, subject in enumerate(SUBJECTS, start=1):
        assert store.accept("a", update(round, subject=subject)) is None
        ended(store, round)
    for round, subject in enumerate(SUBJECTS, start=1):  # all of it once more
        assert store.accept("a", update(round, subject=subject)) in ("duplicate", "subjects")
    assert store.pending() == {}


def test_made_up_subjects_do_not_shut_out_what_others_share(store: RoundStore) -> None:
    for number, each in enumerate(SUBJECTS):
        store.accept(f"liar{number}", update(1, subject=each))
    for device in "ab":
        assert store.accept(device, update(1, subject="f" * 16)) is None
    pending = store.pending()
    assert len(pending) == 256
    assert sorted(pending["f" * 16].devices) == ["a", "b"]


def test_noise_is_recorded(store: RoundStore) -> None:
    store.accept("a", update(1, noise=2.0, clip=0.1))
    store.accept("a", update(1, noise=2.0, clip=0.1))  # the same message twice: nothing new was released
    store.accept("a", update(2, noise=2.0, clip=0.1))
    store.accept("b", update(1))
    store.accept("a", update(3))
    found = sorted(tuple(each) for each in store.noisy_releases())
    assert found == [("a", 0.0, 1), ("a", 2.0, 2), ("b", 0.0, 1)]
    store.accept("a", update(4, noise=1.0, clip=0.1))
    mixed = next(each for each in store.noisy_releases() if each.noise)
    assert mixed.updates / mixed.noise**2 == pytest.approx(2 / 4 + 1)  # what composition depends on


def test_what_is_refused_has_been_released_all_the_same(store: RoundStore) -> None:
    said = {"noise": 2.0, "clip": 0.1}
    assert store.accept("a", update(5, **said)) is None
    assert store.accept("a", update(5, threshold=0.6, **said)) == "duplicate"  # of a device that forgot the first
    assert store.accept("a", update(4, **said)) == "superseded"
    store.released("a", 2.0)  # as the rounds tell of what they refuse themselves
    assert [tuple(each) for each in store.noisy_releases()] == [("a", 2.0, 4)]


def test_a_ledger_of_too_many_devices_counts_the_rest_together(
    store: RoundStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.edge.number_store._RELEASES", 2)
    for device in "abcd":
        store.accept(device, update(1, noise=2.0, clip=0.1))
        store.accept(device, update(2, noise=2.0, clip=0.1))
    assert {each.device: each.updates for each in store.noisy_releases()} == {"a": 2, "b": 2, "": 4}


def test_a_transaction_that_fails_leaves_all_as_it_was(store: RoundStore) -> None:
    store.accept("a", update(1))

    def failing() -> None:
        with store.transaction() as state:
            state.round = state.number = 7
            store.counted(SUBJECT, 7)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert store.state.round == store.state.number == 0
    assert SUBJECT in store.pending()


def test_history_is_bounded(store: RoundStore) -> None:
    for number in range(1, 8):
        with store.transaction():
            kept = {SUBJECT: Kept(Told(Level(number / 10, 1.0, 1)), number)}
            store.remember(Entry(number, number, "round", number, 1), kept, 3)
    assert [entry.number for entry in store.history()] == [7, 6, 5]
    assert store.content()[SUBJECT].told.level.threshold == 0.7
    assert store.content(5)[SUBJECT].told.level.threshold == 0.5
    assert store.content(1) == {}


def test_one_edge_at_a_time(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    assert holder(tmp_path, LOCK) is not None
    with pytest.raises(StoreInUse, match="in use by process"):
        RoundStore(tmp_path)
    store.close()
    assert holder(tmp_path, LOCK) is None
    RoundStore(tmp_path).close()


def test_a_damaged_database_is_moved_aside(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    store.accept("a", update(1))
    store.close()
    (tmp_path / DATABASE).write_bytes(b"no database" * 1000)
    store = RoundStore(tmp_path)
    assert store.pending() == {}
    store.close()
    assert (tmp_path / f"{DATABASE}.damaged").exists()


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    RoundStore(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer Skerry"):
        RoundStore(tmp_path)
    assert holder(tmp_path, LOCK) is None
