"""Full disks, damaged files, wrong versions, two processes: the device goes on, and what it has is not harmed."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from agent.memory.memory import EntryMemory
from agent.memory.segments_build import Built, Order, build
from protocol.errors import StoreError
from tests.agent.memory.memories import (
    ORIGIN,
    PATIENCE,
    SPACE,
    Keys,
    entries,
    entry,
    indexed,
    keys,
    opened,
    stored,
    tokens,
)

FULL_DISK = """
import resource, sys
from pathlib import Path
from protocol.errors import StoreError
from tests.agent.memory.memories import *

folder, known = Path(sys.argv[1]), keys(4000, width=64)
with opened(folder, tail_limit=10_000) as memory:
    memory.add(entries(known[:50]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))  # bytes that any file may have
    added = 50
    try:
        while added < 4000:
            memory.add(entries(known[added : added + 50], first=added))
            added += 50
        raise SystemExit("the disk was never full")
    except StoreError as error:
        assert "cannot be written" in str(error), error
    assert tokens(memory, known[added]) != [added], "what was refused is not half there"
    assert memory.stats().write_errors > 0
    for number in range(added, added + 20):
        memory.learn(entry(number, known[number]))
        assert tokens(memory, known[number]) == [number], "what is learned is found, though not durable"
    assert [tokens(memory, known[n]) for n in range(added)] == [[n] for n in range(added)]
    for _ in range(2):
        try:
            memory.add(entries(known[3000:3050], first=3000))
            raise SystemExit("the disk is still full")
        except StoreError:
            pass
    assert memory.stats().pending == 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory.add(entries(known[3000:3050], first=3000)) == 50, "there is room again"
    memory.flush()
    assert memory.stats().pending == 0
    print(added)
"""


def test_a_full_disk_and_room_again(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], stdout=subprocess.PIPE, timeout=PATIENCE, check=True
    )
    added = int(child.stdout)
    assert added > 50
    with opened(tmp_path) as memory:
        assert sorted(stored(tmp_path).values()) == [*range(added + 20), *range(3000, 3050)]
        assert memory.settle(PATIENCE)
        assert indexed(memory) == sorted(stored(tmp_path))


def test_a_disk_that_stays_full_takes_no_more_and_no_more_ram(tmp_path: Path) -> None:
    known = keys(1, width=8)[0]
    with opened(tmp_path, tail_limit=1 << 20) as memory:
        memory.flush()
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, soft[1]))
        try:
            for number in range(12_000):
                memory.learn(entry(number, known))
            stats = memory.stats()
            with pytest.raises(StoreError, match="cannot be written"):
                memory.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert stats.counts.lost > 0
        assert stats.entries + stats.counts.lost == 12_000
        assert stats.pending <= 8192 + 2048
        memory.flush()
    assert len(stored(tmp_path)) == stats.entries


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path) as memory:
        memory.add(entries(keys(5)))
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
            opened(tmp_path)
        assert len(memory.neighbours(SPACE, keys(1)[0], bytes(8), 9)) == 5
    with opened(tmp_path) as memory:
        assert memory.stats().entries == 5


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be written"):
        opened(tmp_path / "file" / "memory")


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as memory:
        memory.add(entries(keys(5)))
    with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = (tmp_path / "memory.db").read_bytes()
    with pytest.raises(StoreError, match="newer Skerry"):
        opened(tmp_path)
    assert (tmp_path / "memory.db").read_bytes() == before
    with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
        connection.execute("PRAGMA user_version = 1")
    with opened(tmp_path) as memory:
        assert memory.stats().entries == 5, "the lock was given back"


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 1000)


def torn(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))


def cut(path: Path) -> None:
    os.truncate(path, 3 * 8192)


@pytest.mark.parametrize("harm", [garbage, torn, cut])
def test_a_damaged_file_is_set_aside(tmp_path: Path, harm: object, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as memory:
        memory.add(entries(keys(300)))
        assert memory.settle(PATIENCE)
    harm(tmp_path / "memory.db")  # type: ignore[operator]
    harmed = (tmp_path / "memory.db").read_bytes()
    with opened(tmp_path) as memory:
        assert memory.stats().entries == 0
        assert memory.stats().counts.damaged_files == 1
        assert (tmp_path / "damaged-memory.db").read_bytes() == harmed
        assert "damaged" in caplog.text
        assert memory.neighbours(SPACE, keys(1)[0], bytes(8), 5) == []
        assert memory.add(entries(keys(200))) == 200
        assert memory.settle(PATIENCE)
        assert indexed(memory) == sorted(stored(tmp_path))
    with opened(tmp_path) as memory:
        assert memory.stats().entries == 200
        assert memory.stats().counts.damaged_files == 0


def add_all(memory: EntryMemory, known: Keys) -> None:
    for start in range(100, len(known), 50):
        memory.add(entries(known[start : start + 50], first=start))


def test_damage_that_is_met_while_running(tmp_path: Path) -> None:
    """What is only in RAM yet is not lost with the file."""
    known = keys(3000, width=64)
    with opened(tmp_path, build=lambda order: pytest.fail("there is nothing to read")) as memory:
        memory.add(entries(known[:80]))
        with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        torn(tmp_path / "memory.db")
        memory.learn(entry(80, known[80]))
        with pytest.raises(StoreError, match="damaged"):
            add_all(memory, known)  # until a page is met that is not in SQLite's cache
        assert memory.stats().counts.damaged_files == 1
        assert memory.stats().write_errors > 0
        assert (tmp_path / "damaged-memory.db").exists()
        memory.add(entries(known[:10]))
        assert tokens(memory, known[3]) == [3]
        assert memory.stats().entries == len(stored(tmp_path))


def test_damage_that_only_a_merge_meets(tmp_path: Path) -> None:
    known = keys(600, width=64)
    with opened(tmp_path, tail_limit=10_000) as memory:
        memory.add(entries(known))
    with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute("SELECT pageno FROM dbstat WHERE name = 'keys' LIMIT 1 OFFSET 3").fetchone()
    with opened(tmp_path, tail_limit=10_000) as memory:
        memory.flush()
        with (tmp_path / "memory.db").open("r+b") as file:
            file.seek((page - 1) * 8192)
            file.write(b"\xff" * 8192)
    path = tmp_path / "segment-1.annoy"
    assert not path.exists()
    checked = threading.Event()

    def meets(order: Order) -> Built:
        try:
            return build(order)
        except sqlite3.DatabaseError:
            checked.set()
            raise

    with opened(tmp_path, build=meets) as memory:
        if memory.stats().counts.damaged_files == 0:
            assert checked.wait(PATIENCE)
            memory.flush()
        assert memory.stats().counts.damaged_files == 1
        assert memory.add(entries(known[:10])) == 10


def test_keys_that_cannot_be_read_leave_the_rest(tmp_path: Path) -> None:
    known = keys(260)
    with opened(tmp_path) as memory:
        memory.add(entries(known))
        assert memory.settle(PATIENCE)
    with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
        connection.execute("DELETE FROM keys WHERE slot < 10")
        connection.execute("UPDATE keys SET key = x'0102' WHERE slot BETWEEN 10 AND 19")
        connection.commit()
    with opened(tmp_path) as memory:
        for number in range(20):
            assert number not in tokens(memory, known[number], 50)
        assert [tokens(memory, key) for key in known[20:]] == [[number] for number in range(20, 260)]
    for path in tmp_path.glob("segment-*"):
        path.unlink()
    with opened(tmp_path) as memory:
        assert memory.settle(PATIENCE)
        assert [tokens(memory, key) for key in known[20:]] == [[number] for number in range(20, 260)]
        assert indexed(memory) == sorted(stored(tmp_path))
        assert len(stored(tmp_path)) == 240


def test_a_stop_in_the_middle_of_a_migration(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
        connection.execute("CREATE TABLE _sqlite_migrations (id INTEGER PRIMARY KEY, migration_set, name, applied_at)")
    with opened(tmp_path) as memory:
        assert memory.add(entries(keys(5))) == 5


def test_flush_after_close_says_so(tmp_path: Path) -> None:
    memory: EntryMemory = opened(tmp_path)
    memory.add(entries(keys(5)))
    memory.close()
    with pytest.raises(StoreError, match="closed"):
        memory.add(entries(keys(5, seed=1), first=10, origin=ORIGIN))
