"""The disk and the machine fail while a ledger is written."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from agent.learn.ledger import Ledger
from agent.learn.ledger_store import LedgerReader, LedgerValues
from protocol.errors import StoreError, StoreInUse
from tests.agent.learn.ledgers import row
from tests.brokers import ROOT

KILLS = 8


def positions(path: Path) -> list[int]:
    with sqlite3.connect(path) as db:
        return [position for (position,) in db.execute("SELECT position FROM rows ORDER BY id")]


def test_what_was_flushed_is_there_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    chance = random.Random(1)
    told = begin = 0
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.agent.learn.ledgers", str(path), str(begin)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(chance.randrange(1, 40)):
                told = int(writer.stdout.readline())
            writer.kill()
            told = max([told, *map(int, writer.stdout.read().split())])
        begin = told + 1
    ledger = Ledger(path)
    sample = ledger.sample()
    ledger.close()
    found = positions(path)
    # A run begins at the last number told, so what a killed one wrote beyond it comes once more.
    assert set(range(told + 1)) <= set(found)
    assert len(sample) == len(found) < 2 * told
    assert sample.steps == 2 * len(found), "each row with the step kept before it, none counted twice"


def limit(ledger: Ledger, pages: int) -> None:
    """A full disk, as SQLite sees it."""
    ledger._file._db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_delays_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    ledger.put("goal", b"kept")
    limit(ledger, 1)
    for number in range(1000):
        ledger.passed(0.1, 0.02)
        ledger.note(row(number))
    assert not ledger.flush()
    assert len(ledger.sample()) == 1000, "it goes on in RAM"
    with pytest.raises(StoreError, match="free some space"):
        ledger.put("goal", bytes(100_000))
    assert ledger.get("goal") == b"kept"
    assert ledger.errors >= 2
    limit(ledger, 1_000_000)
    assert ledger.flush()
    ledger.close()
    assert positions(path) == list(range(1000))


def test_on_a_full_disk_ram_is_bounded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db", rows=100)
    limit(ledger, 1)
    for number in range(1000):
        ledger.note(row(number, u=number / 1000))
        if number % 300 == 0:
            ledger.flush()
    assert ledger.sample().u.tolist() == [number / 1000 for number in range(900, 1000)]
    ledger.close()


@pytest.mark.parametrize("damage", ["garbage", "torn", "zeros"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    for number in range(2000):
        ledger.note(row(number))
    ledger.close()
    whole = path.read_bytes()
    assert len(whole) > 40_000
    broken = {"garbage": b"not a database" * 1000, "torn": whole[:20_000], "zeros": whole[:8192] + bytes(len(whole))}
    path.write_bytes(broken[damage])
    again = Ledger(path)
    assert len(again.sample()) == 0
    again.note(row())
    assert again.flush()
    again.close()
    assert path.with_name("ledger.db.damaged").read_bytes() == broken[damage]


@pytest.mark.parametrize("runs", [False, True])
def test_goal_and_rounds_outlive_damage_to_the_rows(tmp_path: Path, runs: bool) -> None:
    """Or the privacy that is spent would be forgotten with them."""
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    ledger.put("goal", b"kept")
    ledger.put("rounds", b"spent")
    for number in range(2000):
        ledger.note(row(number))
    assert ledger.flush()
    ledger._file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._file._db.execute("PRAGMA cache_size = 1")
    if not runs:
        ledger.close()
    with path.open("r+b") as file:
        file.seek(10 * 4096)
        file.write(b"\xff" * (path.stat().st_size - 10 * 4096))
    if runs:
        with pytest.raises(StoreError, match="cannot be read"):
            ledger.sample()
        assert ledger.flush()
    else:
        ledger = Ledger(path)
    assert (ledger.get("goal"), ledger.get("rounds")) == (b"kept", b"spent")
    assert len(ledger.sample()) == 0
    assert path.with_name("ledger.db.damaged").exists()
    ledger.close()


def test_damage_that_shows_while_it_runs_costs_what_was_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    for number in range(2000):
        ledger.note(row(number))
    assert ledger.flush()
    ledger._file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._file._db.execute("PRAGMA cache_size = 1")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    ledger.note(row(7))
    with pytest.raises(StoreError, match="cannot be read"):
        ledger.sample()
    assert ledger.flush()
    assert ledger.errors == 1
    assert len(ledger.sample()) == 1
    ledger.close()
    assert positions(path) == [7]


def test_readers_are_told_of_damage_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        LedgerReader(path).sample()
    with pytest.raises(StoreError, match="damaged"):
        LedgerValues(path)
    assert path.read_bytes() == b"not a database" * 1000


def test_a_second_agent_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    first = Ledger(path)
    with pytest.raises(StoreInUse, match="in use by process"):
        Ledger(path)
    first.close()
    first.close()
    Ledger(path).close()


def test_a_file_of_the_future_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    for opened in (Ledger, LedgerValues):
        with pytest.raises(StoreError, match="newer Skerry"):
            opened(path)
    assert not path.with_name("ledger.db.damaged").exists()


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be written"):
        Ledger(tmp_path / "file" / "ledger.db")
