"""The index's files: whatever happens to them, SQLite has what they are made of."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.memory.segments_build import BuildFailed, Built, ChildBuilder, Order, build
from tests.agent.memory.memories import PATIENCE, Keys, entries, indexed, keys, opened, stored, tokens

COUNT = 300


@pytest.fixture
def known() -> Keys:
    return keys(COUNT)


@pytest.fixture
def folder(tmp_path: Path, known: Keys) -> Path:
    """Of a closed memory with all entries in one segment."""
    with opened(tmp_path) as memory:
        memory.add(entries(known))
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].unindexed == 0
    return tmp_path


def segment(folder: Path) -> Path:
    (path,) = folder.glob("segment-*")
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncate_by_a_node(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 140)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(140))


def remove(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [truncate, truncate_by_a_node, empty, flip, lengthen, remove, replace_by_folder])
def test_a_harmed_segment_is_never_mapped_and_built_anew(
    folder: Path, known: Keys, harm: Callable[[Path], None]
) -> None:
    before = segment(folder)
    harm(before)
    let = threading.Event()

    def held(order: Order) -> Built:
        assert let.wait(PATIENCE)
        return build(order)

    with opened(folder, build=held) as memory:
        assert memory.stats().counts.damaged_segments == 1
        assert memory.stats().spaces[0].unindexed == COUNT
        assert [tokens(memory, key) for key in known] == [[number] for number in range(COUNT)], "exactly, meanwhile"
        let.set()
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].unindexed == 0
        assert indexed(memory) == sorted(stored(folder))
    with opened(folder) as memory:
        assert memory.stats().counts.damaged_segments == 0
        assert [tokens(memory, key) for key in known] == [[number] for number in range(COUNT)]


def test_no_code_is_taken_from_the_working_directory(
    tmp_path: Path, known: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "here" / "agent"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('run by mistake')\n")
    monkeypatch.chdir(trap.parent)
    with opened(tmp_path / "memory", build=ChildBuilder()) as memory:
        memory.add(entries(known))
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].unindexed == 0


def test_a_sound_segment_is_used_again(folder: Path) -> None:
    before = segment(folder).stat()

    def nobody(order: Order) -> Built:
        raise AssertionError("nothing is to be built")

    with opened(folder, build=nobody) as memory:
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].segments == 1
        assert memory.stats().counts.merge_errors == 0
    assert segment(folder).stat().st_ino == before.st_ino


def test_files_that_a_power_cut_left_half_done_go(folder: Path, known: Keys) -> None:
    """A part of a segment; a whole one that the database does not know of yet."""
    whole = segment(folder).read_bytes()
    part, orphan = folder / "segment-7.99.part", folder / "segment-8.annoy"
    part.write_bytes(whole[:1000])
    orphan.write_bytes(whole)
    with opened(folder) as memory:
        assert not part.exists()
        assert not orphan.exists()
        assert memory.stats().counts.damaged_segments == 0
        assert memory.add(entries(keys(COUNT, seed=3), first=COUNT)) == COUNT
        assert memory.settle(PATIENCE)
        assert indexed(memory) == sorted(stored(folder))


def test_segments_stay_few_and_whole(tmp_path: Path) -> None:
    known = keys(3000)
    with opened(tmp_path, build=build) as memory:
        for start in range(0, 3000, 60):
            memory.add(entries(known[start : start + 60], first=start))
            if start % 300 == 0:
                assert memory.settle(PATIENCE)
                assert memory.stats().spaces[0].segments <= 4
                assert indexed(memory) == sorted(stored(tmp_path))
        assert memory.settle(PATIENCE)
        assert len(list(tmp_path.glob("segment-*"))) == memory.stats().spaces[0].segments


def test_a_segment_with_many_holes_is_built_anew(folder: Path, known: Keys) -> None:
    with opened(folder) as memory:
        size = segment(folder).stat().st_size
        gone = [memory.neighbours(entries(known)[0].space, known[n], bytes(8), 1)[0].id for n in range(100)]
        for _ in range(3):
            memory.blame(gone)
        assert memory.settle(PATIENCE)
        assert segment(folder).stat().st_size < 0.8 * size
        assert memory.stats().spaces[0].unindexed == 0
        assert indexed(memory) == sorted(stored(folder))
        assert len(stored(folder)) == COUNT - 100


def test_a_build_that_fails_costs_nothing_but_time(tmp_path: Path, known: Keys) -> None:
    failed = threading.Event()

    def fails(order: Order) -> Built:
        Path(order.file).write_bytes(b"half of it")
        failed.set()
        raise BuildFailed("as a full disk would")

    with opened(tmp_path, build=fails) as memory:
        memory.add(entries(known))
        assert failed.wait(PATIENCE)
        assert [tokens(memory, key) for key in known] == [[number] for number in range(COUNT)]
        assert memory.add(entries(keys(50, seed=2), first=COUNT)) == 50
    assert list(tmp_path.glob("segment-*")) == []
    with opened(tmp_path) as memory:
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].segments == 1
        assert indexed(memory) == sorted(stored(tmp_path))


def test_a_segment_that_was_written_wrongly_is_not_taken(tmp_path: Path, known: Keys) -> None:
    failed = threading.Event()

    def lies(order: Order) -> Built:
        built = build(order)
        flip(Path(order.file))
        failed.set()
        return built

    with opened(tmp_path, build=lies) as memory:
        memory.add(entries(known))
        assert failed.wait(PATIENCE)
        assert [tokens(memory, key) for key in known[:20]] == [[number] for number in range(20)]
    with opened(tmp_path) as memory:
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].segments == 1
        assert memory.stats().counts.damaged_segments == 0


def test_building_happens_in_another_process_that_may_be_killed(tmp_path: Path, known: Keys) -> None:
    from agent.memory import segments_build

    child = segments_build.ChildBuilder()
    killed: list[int] = []
    done = threading.Event()

    def kill_once(order: Order) -> Built:
        if killed:
            return child(order)
        pump = threading.Thread(target=end_it)
        pump.start()
        try:
            return child(order)
        finally:
            pump.join()
            done.set()

    def end_it() -> None:
        while (process := child._child) is None:
            pass
        assert process.pid != os.getpid()
        process.send_signal(signal.SIGKILL)
        killed.append(process.pid)

    with opened(tmp_path, build=kill_once) as memory:
        memory.add(entries(known))
        assert done.wait(PATIENCE)
        assert [tokens(memory, key) for key in known[:20]] == [[number] for number in range(20)]
    with opened(tmp_path, build=kill_once) as memory:
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].segments == 1
