"""The lessons' file: a SQLite database in WAL, which the agent and commands may use at the same time.

Private lessons lie in a table of their own. What is deleted is overwritten, and `scrub` leaves nothing of it in file
and log.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.memory.memory_bounds import log_bytes
from agent.memory.store import damaged
from protocol.errors import StoreError
from protocol.folder_lock import FolderLock
from protocol.set_aside import set_aside

log = logging.getLogger(__name__)

SCHEMA = 1
DATABASE, LOCK = "lessons.db", "lessons.lock"
_BUSY_S = 5.0
_RETRY_S = 0.05
_EVICTED = 20  # at each try, a part of this many of the lessons goes
_TABLES = {False: "lessons", True: "private"}
_COLUMNS = (
    "(number INTEGER PRIMARY KEY, model TEXT NOT NULL, source TEXT NOT NULL, answer TEXT NOT NULL, "
    "at REAL NOT NULL, lesson BLOB NOT NULL) STRICT"
)


@dataclass(frozen=True, slots=True)
class Row:
    """`model`: fingerprint of the model whose tokens it has. `answer`: the answer that it came from, "" if none did.
    `at`: seconds of the lessons' clock. `lesson`: encoded. `erased`: how often something was forgotten before."""

    private: bool
    model: str
    source: str
    answer: str
    at: float
    lesson: bytes
    erased: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """`revision`: additions since the file was made. `erased`: times that something was forgotten. `seconds` of the
    lessons' clock at the wall clock's time `wall`, None at the beginning."""

    revision: int
    erased: int
    seconds: float
    wall: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """Lessons of one model and source."""

    private: bool
    model: str
    source: str
    count: int
    bytes: int
    oldest: float  # seconds of the lessons' clock


class LessonsFile:
    """Used by one thread at a time. Raises StoreError if the file can't be opened; a damaged one is moved aside, by
    whichever process holds the lock. Later failures are sqlite3.Error, and leave everything as it was."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.path = folder / DATABASE
        self.broken = False  # an attempt to begin anew failed
        self._log_bytes = log_bytes(max_bytes)
        self._room = max_bytes - self._log_bytes
        self._guard: FolderLock | None = None
        with contextlib.suppress(StoreError):  # the agent has it, or the folder refuses, which opening tells better
            self._lock()
        try:
            self._db = self._open()
        except BaseException:
            self._unlock()
            raise

    def write(self, new: Iterable[Row], seconds: float, wall: float, oldest: float) -> None:
        """All of it, and on the disk when this returns, or nothing. A row replaces those of the same answer, and is
        passed over if something was forgotten since it was noted. Lessons from before `oldest` go, and the oldest of
        what is too much."""
        with _transaction(self._db) as db:
            state = self.state()
            revision = state.revision
            for row in new:
                if row.erased is not None and row.erased != state.erased:
                    continue
                revision += 1
                _delete_answer(db, row.answer)
                db.execute(
                    f"INSERT INTO {_TABLES[row.private]} VALUES (?, ?, ?, ?, ?, ?)",
                    (revision, row.model, row.source, row.answer, row.at, row.lesson),
                )
            for table in _TABLES.values():
                db.execute(f"DELETE FROM {table} WHERE at < ?", (oldest,))
            self._evict()
            db.execute("UPDATE state SET revision = ?, seconds = max(seconds, ?), wall = ?", (revision, seconds, wall))

    def drop(self, answer: str) -> int:
        """How many lessons of this answer went."""
        with _transaction(self._db) as db:
            return _delete_answer(db, answer)

    def forget(self, source: str | None, private: bool, before: float | None) -> int:
        """How many lessons went: all to which everything that is given applies. `private`: only private ones."""
        conditions: list[str] = ["true"]
        values: list[object] = []
        if source is not None:
            conditions.append("source = ?")
            values.append(source)
        if before is not None:
            conditions.append("at < ?")
            values.append(before)
        tables = [_TABLES[True]] if private else list(_TABLES.values())
        with _transaction(self._db) as db:
            where = " AND ".join(conditions)
            gone = sum(db.execute(f"DELETE FROM {table} WHERE {where}", values).rowcount for table in tables)
            db.execute("UPDATE state SET erased = erased + 1")
        return gone

    def scrub(self) -> None:
        """Rewrites file and log without what was deleted, and removes a damaged file that was set aside. Raises
        sqlite3.Error if others use the file all the time, OSError."""
        self._db.execute("VACUUM")
        until = time.monotonic() + _BUSY_S
        while self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() >= until:
                raise sqlite3.OperationalError("another process keeps on reading it")
            time.sleep(_RETRY_S)
        self.path.with_name(self.path.name + ".damaged").unlink(missing_ok=True)

    def newest(self, model: str, private: bool, most: int, most_bytes: int) -> list[bytes]:
        """Newest first. `private`: with the private ones."""
        tables = _TABLES.values() if private else [_TABLES[False]]
        query = " UNION ALL ".join(f"SELECT number, lesson FROM {table} WHERE model = ?1" for table in tables)
        found: list[bytes] = []
        with contextlib.closing(self._db.execute(f"{query} ORDER BY number DESC LIMIT ?2", (model, most))) as rows:
            for _, lesson in rows:
                most_bytes -= len(lesson)
                if most_bytes < 0:
                    break
                found.append(lesson)
        return found

    def groups(self) -> list[Group]:
        facts = "model, source, count(*), sum(length(lesson)), min(at)"
        return [
            Group(private, *row)
            for private, table in _TABLES.items()
            for row in self._db.execute(f"SELECT {facts} FROM {table} GROUP BY model, source ORDER BY model, source")
        ]

    def state(self) -> State:
        return State(*self._db.execute("SELECT revision, erased, seconds, wall FROM state").fetchone())

    def start_over(self) -> None:
        """With an empty file, since this one turned out to be damaged. Raises StoreError, also while another process
        uses it; OSError, sqlite3.Error."""
        self._lock()
        self.broken = True
        self._db.close()
        self._db = self._replace()
        self.broken = False

    def close(self) -> None:
        self._db.close()
        self._unlock()

    def _lock(self) -> None:
        if self._guard is None:
            self._guard = FolderLock(self.path.parent, LOCK, "the lessons'", "device.folder")

    def _unlock(self) -> None:
        if self._guard is not None:
            self._guard.close()

    def _open(self) -> sqlite3.Connection:
        try:
            try:
                db = self._connect()
                (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if found == "ok":
                    return db
                db.close()
            except sqlite3.DatabaseError as error:
                if not damaged(error):
                    raise
            self._lock()
            return self._replace()
        except OSError as error:
            raise StoreError(f"{self.path}: the lessons cannot be opened: {error.strerror}") from None
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: the lessons cannot be used: {error}") from None

    def _replace(self) -> sqlite3.Connection:
        log.error("%s: damaged; moved to %s. Lessons are collected anew", self.path, set_aside(self.path))
        return self._connect()

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o600)  # which its log inherits: lessons are what somebody wrote
        db = sqlite3.connect(self.path, _BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db, self._log_bytes)
        except BaseException:
            db.close()
            raise
        return db

    def _evict(self) -> None:
        """Within a transaction: the oldest go until the pages in use are few enough."""
        while self._used() > self._room:
            numbers = " UNION ALL ".join(f"SELECT number FROM {table}" for table in _TABLES.values())
            (count,) = self._db.execute(f"SELECT count(*) FROM ({numbers})").fetchone()
            if not count:
                return
            (last,) = self._db.execute(
                f"SELECT number FROM ({numbers}) ORDER BY number LIMIT 1 OFFSET ?", (count // _EVICTED,)
            ).fetchone()
            for table in _TABLES.values():
                self._db.execute(f"DELETE FROM {table} WHERE number <= ?", (last,))

    def _used(self) -> int:
        """Bytes."""
        pages, free, size = (
            int(self._db.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size


def _prepare(db: sqlite3.Connection, log_bytes: int) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA:
        raise StoreError(
            "the lessons were written by a newer Skerry: update this one, or give it another device.folder"
        )
    db.execute("PRAGMA journal_mode = WAL")
    (page,) = db.execute("PRAGMA page_size").fetchone()
    for pragma in (
        "synchronous = FULL",
        "secure_delete = ON",
        f"wal_autocheckpoint = {log_bytes // page}",
        f"journal_size_limit = {log_bytes}",
    ):
        db.execute(f"PRAGMA {pragma}").fetchall()
    if version == SCHEMA:
        return
    with _transaction(db):
        for table in _TABLES.values():
            db.execute(f"CREATE TABLE IF NOT EXISTS {table} {_COLUMNS}")
            db.execute(f"CREATE INDEX IF NOT EXISTS {table}_answer ON {table} (answer) WHERE answer != ''")
        db.execute(
            "CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL, "
            "erased INTEGER NOT NULL, seconds REAL NOT NULL, wall REAL) STRICT"
        )
        db.execute("INSERT OR IGNORE INTO state VALUES (1, 0, 0, 0.0, NULL)")
        db.execute(f"PRAGMA user_version = {SCHEMA}")


def _delete_answer(db: sqlite3.Connection, answer: str) -> int:
    if not answer:
        return 0
    where = "answer != '' AND answer = ?"  # as its index has it
    return sum(db.execute(f"DELETE FROM {table} WHERE {where}", (answer,)).rowcount for table in _TABLES.values())


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # on most errors of the disk SQLite has rolled back by itself
            db.execute("ROLLBACK")
        raise
