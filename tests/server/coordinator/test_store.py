from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path

import pytest

from protocol.errors import StoreError, StoreInUse
from protocol.folder_lock import holder
from protocol.rounds import Overall, Whole
from server.coordinator.groups import Grouping
from server.coordinator.reports import Heard
from server.coordinator.store import LOCK, NAME, StateFile, read
from tests.server.coordinator.fleet import SUBJECT, level, report

OVERALL = Overall(4, {SUBJECT: Whole(level(0.3))})
HEARD = {"A": Heard(report(3, 0.2), 10.0), "B": Heard(report(9, 0.4), 20.0)}
GROUPINGS = {SUBJECT: Grouping([[0.1, 0.2, 0.3]], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3], 9, 0.5, 0, 4)}


def write(file: StateFile) -> None:
    file.write(30.0, OVERALL, 5, HEARD, (), GROUPINGS)


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    write(file)
    file.write(40.0, OVERALL, 6, {"B": Heard(report(10, 0.5), 35.0)}, ["A"], {})
    file.close()
    kept = StateFile(tmp_path).kept
    assert (kept.seconds, kept.number, kept.overall, kept.groupings) == (40.0, 6, OVERALL, {})
    assert kept.heard == {"B": Heard(report(10, 0.5), 35.0)}


def test_others_read_it_while_it_is_used(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    write(file)
    assert read(tmp_path).heard == HEARD
    assert read(tmp_path).groupings == GROUPINGS
    assert holder(tmp_path, LOCK) == os.getpid()
    file.close()
    assert holder(tmp_path, LOCK) is None
    assert read(tmp_path).overall == OVERALL


def test_one_coordinator_at_a_time(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    with pytest.raises(StoreInUse, match=r"in use by process .*coordinator\.folder"):
        StateFile(tmp_path)
    file.close()
    StateFile(tmp_path).close()


@pytest.mark.parametrize("damage", [b"not a database at all" * 100, b""])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).write_bytes(damage)
    with caplog.at_level(logging.ERROR):
        file = StateFile(tmp_path)
    assert file.kept.number == 0
    write(file)
    file.close()
    assert read(tmp_path).number == 5
    assert (tmp_path / f"{NAME}.damaged").exists() == bool(damage)
    assert bool(caplog.records) == bool(damage)


def test_rows_that_nobody_wrote_are_damage(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    write(file)
    file.close()
    with sqlite3.connect(tmp_path / NAME) as connection:
        connection.execute("update reports set report = ?", (b"nonsense",))
    connection.close()
    file = StateFile(tmp_path)
    assert file.kept.heard == {}
    file.close()
    assert (tmp_path / f"{NAME}.damaged").exists()


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    write(file)
    with sqlite3.connect(tmp_path / NAME) as other:
        other.execute("create trigger full before insert on groupings begin select raise(abort, 'full'); end")
    with pytest.raises(sqlite3.Error, match="full"):
        file.write(99.0, OVERALL, 6, {}, ["A"], GROUPINGS)
    assert (read(tmp_path).heard, read(tmp_path).number) == (HEARD, 5)
    with other:
        other.execute("drop trigger full")
    other.close()
    file.write(99.0, OVERALL, 6, {}, ["A"], GROUPINGS)
    assert (read(tmp_path).heard.keys(), read(tmp_path).number) == ({"B"}, 6)
    file.close()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        StateFile(tmp_path / "file")
    with pytest.raises(StoreError, match="no coordinator has run"):
        read(tmp_path)
