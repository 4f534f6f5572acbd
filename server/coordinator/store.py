"""What the coordinator keeps: one SQLite file, written in transactions that survive a power cut (WAL,
synchronous=FULL). Others may read it meanwhile; a lock beside it keeps a second coordinator away."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlite_utils import Database

from protocol.errors import ProtocolError, StoreError
from protocol.folder_lock import FolderLock
from protocol.rounds import Overall, decode_overall, decode_report, encode
from protocol.set_aside import set_aside
from server.coordinator.groups import Grouping
from server.coordinator.reports import Heard

log = logging.getLogger(__name__)

NAME = "coordinator.db"
LOCK = f"{NAME}.lock"


@dataclass(frozen=True, slots=True)
class Kept:
    """`number`: the highest that may have been published. `seconds`: running time when this was written. `overall`:
    the last one."""

    number: int
    seconds: float
    overall: Overall
    heard: dict[str, Heard]
    groupings: dict[str, Grouping]


class StateFile:
    """In `folder`. Used by one thread. `kept`: what was there when it was opened.

    Raises StoreError if the file can't be opened, StoreInUse if another process has it; a damaged one is moved aside.
    Later failures of the disk are sqlite3.Error, and leave everything as it was.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = FolderLock(folder, LOCK, "the coordinator's", "coordinator.folder")
        try:
            self._db = _open(folder / NAME)
            self.kept = _read(self._db)
        except BaseException:
            self._lock.close()
            raise

    def write(
        self,
        seconds: float,
        overall: Overall,
        number: int,
        heard: Mapping[str, Heard],
        gone: Iterable[str],
        groupings: Mapping[str, Grouping],
    ) -> None:
        """`heard`: the reports that are new; `gone`: clusters whose report is not needed any more. All of it or
        nothing, and on the disk when this returns."""
        try:
            self._db.execute("begin immediate")
            self._db.execute(
                "update state set seconds = ?, number = ?, overall = ?", (seconds, number, encode(overall))
            )
            self._db.executemany("delete from reports where cluster = ?", [(name,) for name in gone])
            self._db.executemany(
                "insert or replace into reports (cluster, at, report) values (?, ?, ?)",
                [(name, known.at, encode(known.report)) for name, known in heard.items()],
            )
            self._db.execute("delete from groupings")
            self._db.executemany(
                "insert into groupings (subject, grouping) values (?, ?)",
                [(subject, msgspec.json.encode(grouping)) for subject, grouping in groupings.items()],
            )
            self._db.execute("commit")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise

    def close(self) -> None:
        self._db.close()
        self._lock.close()


def read(folder: Path) -> Kept:
    """What is there now, whether a coordinator uses it or not. Raises StoreError if there is nothing readable."""
    path = folder / NAME
    if not path.is_file():
        raise StoreError(f"no coordinator has run in {folder} yet: start one, or name its folder")
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("pragma query_only = true")
            connection.execute("begin")  # all of one moment
            return _read(connection)
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be read: {error}") from None


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.OperationalError as error:
        raise StoreError(f"{path}: the coordinator's state cannot be opened: {error}") from None
    except sqlite3.DatabaseError:
        aside = set_aside(path)
        log.error("%s: damaged; moved to %s: the numbers go on from what brokers and edges say", path, aside)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        connection.execute("pragma journal_size_limit = 1048576")
        if connection.execute("pragma quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        _tables(Database(connection))
        _read(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _tables(db: Database) -> None:
    with db.conn:
        db.table("state").create(
            {"one": int, "seconds": float, "number": int, "overall": bytes}, pk="one", if_not_exists=True, strict=True
        )
        db.table("state").insert({"one": 1, "seconds": 0.0, "number": 0, "overall": encode(Overall(0))}, ignore=True)
        db.table("reports").create(
            {"cluster": str, "at": float, "report": bytes}, pk="cluster", if_not_exists=True, strict=True
        )
        db.table("groupings").create({"subject": str, "grouping": bytes}, pk="subject", if_not_exists=True, strict=True)


def _read(connection: sqlite3.Connection) -> Kept:
    """Raises sqlite3.DatabaseError for what this program did not write."""
    try:
        seconds, number, overall = connection.execute("select seconds, number, overall from state").fetchone()
        heard = {}
        for name, at, payload in connection.execute("select cluster, at, report from reports"):
            if (report := decode_report(payload)) is not None:
                heard[name] = Heard(report, at)
        rows = connection.execute("select subject, grouping from groupings")
        groupings = {subject: msgspec.json.decode(found, type=Grouping) for subject, found in rows}
        return Kept(number, seconds, decode_overall(overall) or Overall(number), heard, groupings)
    except (TypeError, ProtocolError, msgspec.DecodeError) as error:
        raise sqlite3.DatabaseError(f"unreadable: {type(error).__name__}") from None
