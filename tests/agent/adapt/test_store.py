"""Which adapters there are, which are in use, and that this survives what disks and processes do."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.adapt import store as stores
from agent.adapt.job import Scores, Verdict
from agent.adapt.store import AdapterStore
from models.adapter import write
from protocol.errors import BadAdapter, StoreError
from tests.agent.adapt.adapters import MODEL, small, small_file
from tests.brokers import ROOT

VERDICT = Verdict(True, "better", 12, Scores(2.0, 0.4, 20.0), None, Scores(0.5, 0.9, 21.0), 0.001)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters", MODEL, clock=lambda: 1000.0)


def used(store: AdapterStore, folder: Path, *seeds: int, slot: str = "own") -> list[str]:
    """Adds each and puts it into the slot; their ids."""
    ids = []
    for seed in seeds:
        ids.append(store.add(small_file(folder, seed), "own").id)
        store.commit(slot, ids[-1], "better")
    return ids


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def test_what_is_added_is_named_by_its_content_and_keeps_its_numbers(store: AdapterStore, tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    id = write(small(1), path)
    kept = store.add(path, "own", lessons=80, private=True, verdict=VERDICT)
    assert (kept.id, kept.version, kept.rank, kept.lessons, kept.private) == (id, 1, 2, 80, True)
    assert kept.verdict == VERDICT
    assert store.path(id).read_bytes() == path.read_bytes()
    assert store.adapters() == [kept]
    assert store.add(path, "file") == kept, "the same file is the same adapter"
    assert store.in_use() == {}


def test_another_process_opens_it_as_it_was_left(store: AdapterStore, tmp_path: Path) -> None:
    first, second = used(store, tmp_path, 1, 2)
    again = AdapterStore(tmp_path / "adapters", MODEL)
    assert again.in_use() == {"own": again.path(second)}
    assert again.number == store.number == 2
    again.commit("own", first, "chosen")
    assert store.number == 3
    assert store.in_use() == {"own": store.path(first)}


def test_adapters_of_another_model_are_refused_and_its_slots_are_others(store: AdapterStore, tmp_path: Path) -> None:
    used(store, tmp_path, 1)
    with pytest.raises(BadAdapter, match="another model"):
        store.add(small_file(tmp_path, 2, model="cd" * 32), "file")
    assert AdapterStore(tmp_path / "adapters", "cd" * 32).in_use() == {}


def test_rollback_goes_back_step_by_step_under_new_numbers(store: AdapterStore, tmp_path: Path) -> None:
    first, second, third = used(store, tmp_path, 1, 2, 3)
    assert store.state().slots == {"own": third}
    for number, expected in ((4, {"own": second}), (5, {"own": first}), (6, {})):
        assert store.rollback().slots == expected == store.state().slots
        assert store.number == number
    with pytest.raises(StoreError, match="nothing to go back to"):
        store.rollback()
    store.commit("own", third, "chosen")
    assert store.rollback().slots == {}


def test_slots_are_independent_and_can_be_emptied(store: AdapterStore, tmp_path: Path) -> None:
    (own,) = used(store, tmp_path, 1)
    (fleet,) = used(store, tmp_path, 2, slot="fleet.0")
    assert store.state().slots == {"own": own, "fleet.0": fleet}
    store.commit("own", None, "emptied")
    assert store.in_use() == {"fleet.0": store.path(fleet)}
    number = store.number
    assert store.commit("own", None, "again") == number, "no change, no new number"
    for slot in ("", "../x", "A", ".hidden"):
        with pytest.raises(StoreError, match="slot"):
            store.commit(slot, own, "")
    with pytest.raises(StoreError, match="not there"):
        store.commit("own", "00" * 32, "")


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-40]), Path.unlink])
def test_a_damaged_adapter_is_set_aside_and_the_last_good_one_goes_on(
    damage: object, store: AdapterStore, tmp_path: Path
) -> None:
    first, second, third = used(store, tmp_path, 1, 2, 3)
    damage(store.path(third))  # type: ignore[operator]
    assert store.in_use() == {"own": store.path(second)}
    assert store.number == 4, "whoever watches hears of it"
    assert not store.path(third).exists()
    flip_a_bit(store.path(second))
    flip_a_bit(store.path(first))
    assert store.in_use() == {}


def test_a_damaged_state_is_set_aside_and_its_number_is_not_given_again(store: AdapterStore, tmp_path: Path) -> None:
    first, second = used(store, tmp_path, 1, 2)
    (newest,) = (tmp_path / "adapters").rglob("000002.json")
    flip_a_bit(newest)
    assert store.state().slots == {"own": first}
    assert store.number == 2
    assert store.commit("own", second, "again") == 3
    assert AdapterStore(tmp_path / "adapters", MODEL).state().slots == {"own": second}


def test_a_lost_manifest_makes_nothing_shareable(store: AdapterStore, tmp_path: Path) -> None:
    path = small_file(tmp_path, 1)
    kept = store.add(path, "own", private=True)
    store.commit("own", kept.id, "")
    flip_a_bit(tmp_path / "adapters" / MODEL[:16] / f"{kept.id}.json")
    assert store.manifest(kept.id) is None
    assert store.in_use() == {"own": store.path(kept.id)}


def test_what_the_gate_refused_leaves_its_numbers_alone(store: AdapterStore, tmp_path: Path) -> None:
    refused = Verdict(False, "not better", 12)
    kept = store.drop(small_file(tmp_path, 1), "own", lessons=70, verdict=refused)
    assert kept.dropped
    assert not store.path(kept.id).exists()
    assert store.adapters() == [kept]
    with pytest.raises(StoreError, match="no adapter"):
        store.find(kept.id)


def test_find_takes_ids_their_beginnings_and_versions(store: AdapterStore, tmp_path: Path) -> None:
    first, second = used(store, tmp_path, 1, 2)
    assert store.find("v2").id == store.find("2").id == store.find(second[:10]).id == second
    assert store.find(first).id == first
    with pytest.raises(StoreError, match="no adapter"):
        store.find("zz")
    with pytest.raises(StoreError, match="more than one"):
        store.find("")


def test_old_versions_go_but_not_what_is_used_or_was_just_now(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_ADAPTERS", 3)
    (kept,) = used(store, tmp_path, 1, slot="fleet.0")
    ids = used(store, tmp_path, *range(2, 12))
    there = [id for id in ids if store.path(id).exists()]
    assert there == ids[-5:], "the newest, and those of the last four states before it"
    assert store.path(kept).exists()
    assert store.rollback().slots["own"] == ids[-2]


def test_a_full_disk_is_an_error_and_changes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    (first,) = used(store, tmp_path, 1)
    path = small_file(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        with pytest.raises(StoreError, match="free some space"):
            store.add(path, "own")
        with pytest.raises(StoreError, match="free some space"):
            store.commit("own", None, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.in_use() == {"own": store.path(first)}
    assert not [path for path in (tmp_path / "adapters").rglob(".*") if path.is_file()]
    used(store, tmp_path, 2)


def test_kill_9_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    """A process commits without end; whenever it is killed, what it said was done is done."""
    for seed in (1, 2):
        small_file(tmp_path, seed)
    store = AdapterStore(tmp_path / "adapters", MODEL)
    for lines in (1, 2, 3, 5, 8, 13):
        command = [sys.executable, "-m", "tests.agent.adapt.committer", str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(lines):
                line = process.stdout.readline()
            process.kill()
            told = (line + process.stdout.read()).split()
        number, id = int(told[-2]), told[-1]
        state = store.state()
        assert state.number >= number
        assert state.slots["own"] == id or state.number == number + 1
        assert store.in_use()["own"].stem == state.slots["own"]
    assert store.commit("own", None, "the lock of the dead is free") > number


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    for seed in (1, 2):
        small_file(tmp_path, seed)
    command = [sys.executable, "-m", "tests.agent.adapt.committer", str(tmp_path), "20"]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as one,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other,
    ):
        said = [process.communicate()[0].splitlines() for process in (one, other)]
    numbers = [int(line.split()[0]) for lines in said for line in lines]
    assert len(numbers) == 40
    assert max(numbers) == AdapterStore(tmp_path / "adapters", MODEL).number
