"""The disk and the machine fail while lessons are kept."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapt import lessons as module
from agent.adapt import lessons_store as store
from agent.adapt.lessons import Lessons
from protocol.errors import StoreError
from tests.agent.adapt.lessons import MODEL, lesson, numbers
from tests.brokers import ROOT

KILLS = 6


@pytest.fixture
def lessons(tmp_path: Path) -> Iterator[Lessons]:
    lessons = Lessons(tmp_path, MODEL)
    yield lessons
    lessons.close()


def limit(lessons: Lessons, pages: int) -> None:
    """A full disk, as SQLite sees it."""
    lessons._file._db.execute(f"PRAGMA max_page_count = {pages}")


def test_what_was_added_is_there_after_kill_9(tmp_path: Path) -> None:
    chance = random.Random(1)
    begin = 0
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.agent.adapt.lessons", str(tmp_path), str(begin)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(chance.randrange(1, 30)):
                begin = int(writer.stdout.readline()) + 1
            writer.kill()
            begin = max([begin, *(int(line) + 1 for line in writer.stdout.read().split())])
    lessons = Lessons(tmp_path, MODEL)
    found = numbers(lessons)
    assert set(range(begin)) <= set(found)
    assert lessons.revision == len(found) <= begin + KILLS
    lessons.close()


def test_a_full_disk_delays_and_loses_nothing(lessons: Lessons) -> None:
    lessons.add(lesson(0))
    limit(lessons, 1)
    for number in range(1, 200):
        lessons.add(lesson(number, length=200, private=number % 2 == 0))
    assert lessons.waiting > 100
    assert numbers(lessons) == list(range(200)), "it goes on in RAM"
    assert numbers(lessons, private=False) == [0, *range(1, 200, 2)]
    assert (lessons.count, lessons.revision) == (200, 200)
    with pytest.raises(StoreError, match="free some space"):
        lessons.add_all([lesson(1, length=4000)])
    limit(lessons, 1_000_000)
    assert lessons.tend()
    assert lessons.waiting == 0
    assert numbers(lessons) == list(range(200))


def test_on_a_full_disk_ram_is_bounded(lessons: Lessons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNSAVED_BYTES", 10_000)
    limit(lessons, 1)
    for number in range(200):
        lessons.add(lesson(number, length=200))
    waiting = lessons.waiting
    assert 10 < waiting < 50
    assert numbers(lessons)[-waiting:] == list(range(200 - waiting, 200))
    assert lessons.stats().lost == lessons.lost == 200 - lessons.count > 100


def test_what_another_process_forgets_is_not_written_later(lessons: Lessons, tmp_path: Path) -> None:
    limit(lessons, 1)
    for number in range(100):
        lessons.add(lesson(number, length=200))
    limit(lessons, 1_000_000)
    other = Lessons(tmp_path, MODEL)
    other.forget()
    lessons.add(lesson(100))
    assert numbers(lessons) == [100]
    other.close()


@pytest.mark.parametrize("damage", ["garbage", "torn", "zeros"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    lessons = Lessons(tmp_path, MODEL)
    for number in range(300):
        lessons.add(lesson(number, length=200))
    lessons.close()
    path = tmp_path / "lessons.db"
    whole = path.read_bytes()
    broken = {"garbage": b"not a database" * 1000, "torn": whole[:20_000], "zeros": whole[:8192] + bytes(len(whole))}
    path.write_bytes(broken[damage])
    again = Lessons(tmp_path, MODEL)
    assert again.count == 0
    again.add(lesson(7))
    assert numbers(again) == [7]
    again.close()
    assert (tmp_path / "lessons.db.damaged").read_bytes() == broken[damage]


def test_damage_that_shows_while_it_runs_costs_what_was_on_the_disk(lessons: Lessons, tmp_path: Path) -> None:
    for number in range(300):
        lessons.add(lesson(number, length=200))
    database = lessons._file._db
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    database.execute("PRAGMA cache_size = 1")
    path = tmp_path / "lessons.db"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    lessons.add(lesson(7))
    assert numbers(lessons) == [7]
    assert lessons.waiting == 0
    assert (tmp_path / "lessons.db.damaged").exists()


def test_a_new_file_is_made_as_soon_as_the_disk_allows(
    lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage is found while nothing can be written."""
    for number in range(300):
        lessons.add(lesson(number, length=200))
    lessons._file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    lessons._file._db.execute("PRAGMA cache_size = 1")
    path = tmp_path / "lessons.db"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))

    def refuse(path: Path) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "set_aside", refuse)
        lessons.add(lesson(7))
        with pytest.raises(StoreError, match="no new file can be made"):
            lessons.take(private=False)
        assert lessons.waiting == 1
    assert numbers(lessons) == [7]
    assert lessons.waiting == 0


def test_what_is_closed_stays_as_it_is(tmp_path: Path) -> None:
    lessons = Lessons(tmp_path, MODEL)
    lessons.add(lesson(1))
    lessons.close()
    lessons.close()
    with pytest.raises(StoreError, match="closed"):
        lessons.take(private=True)
    again = Lessons(tmp_path, MODEL)
    assert numbers(again) == [1]
    again.close()


def test_a_guest_leaves_a_damaged_file_to_the_agent_that_runs(lessons: Lessons, tmp_path: Path) -> None:
    lessons.add(lesson())
    (tmp_path / "lessons.db").write_bytes(b"not a database" * 1000)
    (tmp_path / "lessons.db-wal").unlink()
    with pytest.raises(StoreError, match="in use by process"):
        Lessons(tmp_path, MODEL)
    assert not (tmp_path / "lessons.db.damaged").exists()


def test_a_lesson_that_is_damaged_alone_is_passed_over(lessons: Lessons) -> None:
    for number in range(3):
        lessons.add(lesson(number))
    lessons._file._db.execute("UPDATE lessons SET lesson = x'C1' WHERE number = 2")
    assert numbers(lessons) == [0, 2]


def test_a_file_of_the_future_is_left_alone(tmp_path: Path) -> None:
    Lessons(tmp_path, MODEL).close()
    with sqlite3.connect(tmp_path / "lessons.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer Skerry"):
        Lessons(tmp_path, MODEL)
    assert not (tmp_path / "lessons.db.damaged").exists()


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be opened"):
        Lessons(tmp_path / "file" / "lessons", MODEL)
