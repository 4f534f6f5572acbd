"""The ledger's file: a SQLite database in WAL that one agent writes; others may read it, and set its values, beside
that."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agent.learn.ledger_rows import Columns, Entry, Fields, Outcome, Since
from agent.learn.sample import BINS, Histogram, Sample
from agent.memory.store import damaged
from protocol.errors import StoreError
from protocol.folder_lock import FolderLock
from protocol.set_aside import set_aside

if TYPE_CHECKING:
    from sqlite_utils import Database

log = logging.getLogger(__name__)

SCHEMA = 1
_BUSY_S = 5.0
_LOG_BYTES = 1 << 20  # of WAL, at which it is copied back
_COLUMNS = "u, beta, propensity, least, outcome, kept"
_MORE = "cost, p, position, reply_seconds"
_ANSWERED = f"('{Outcome.AGREED}', '{Outcome.DIFFERED}')"
_OLD = f"SELECT id FROM rows WHERE outcome {{}} {_ANSWERED} ORDER BY id DESC LIMIT 1 OFFSET ?"


class LedgerFile:
    """Writes rows. Used by one thread at a time. Raises StoreInUse if another process does, StoreError if the file
    can't be opened; a damaged one is moved aside. Later failures are sqlite3.Error, and leave everything as it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = FolderLock(path.parent, path.with_suffix(".lock").name, "the ledger's", "device.folder")
        try:
            self._db = _open(path)
        except BaseException:
            self._guard.close()
            raise

    def write(self, new: Iterable[Entry], seen: Histogram, since: Since, most: int) -> None:
        """All of it, and on the disk when this returns, or nothing. The oldest rows go: `most` that the LLM answered
        stay, with what lies between them, and of the others `most` too, so that an outage does not push out what was
        learned."""
        rows = [(*entry.fields, entry.row.cost, *entry.row.features) for entry in new]
        with _transaction(self._db) as db:
            db.executemany(
                f"INSERT INTO rows ({_COLUMNS}, {_MORE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            db.execute(f"DELETE FROM rows WHERE id <= ({_OLD.format('IN')})", (most,))
            db.execute(
                f"DELETE FROM rows WHERE outcome NOT IN {_ANSWERED} AND id <= ({_OLD.format('NOT IN')})", (most,)
            )
            counts = seen.counts.astype("<f8").tobytes()
            db.execute("UPDATE seen SET counts = ?, kept = ?, least = ?", (counts, since.kept, since.least))

    def rows(self) -> list[Fields]:
        return _rows(self._db)

    def seen(self) -> tuple[Histogram, Since]:
        return _seen(self._db)

    def get(self, name: str) -> bytes | None:
        return _get(self._db, name)

    def put(self, name: str, value: bytes) -> None:
        _put(self._db, name, value)

    def start_over(self) -> None:
        """With an empty file, since this one turned out to be damaged. Raises OSError or sqlite3.Error."""
        self._db.close()
        self._db = _replace(self._path)

    def close(self) -> None:
        self._db.close()
        self._guard.close()


class LedgerReader:
    """Reads, also while an agent writes. Its methods raise StoreError."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise StoreError(f"{path}: there is no ledger yet; it begins when `skerry agent` runs")
        self._path = path
        with _explained(path):
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", _BUSY_S, uri=True, isolation_level=None)

    def sample(self) -> Sample:
        with _explained(self._path):
            return Columns.of(_rows(self._db)).sample()

    def seen(self) -> Histogram:
        with _explained(self._path):
            return _seen(self._db)[0]

    def get(self, name: str) -> bytes | None:
        with _explained(self._path):
            return _get(self._db, name)

    def close(self) -> None:
        self._db.close()


class LedgerValues:
    """The values alone, to be set while an agent runs or before one ever did. Its methods raise StoreError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)

    def get(self, name: str) -> bytes | None:
        with _explained(self._path):
            return _get(self._db, name)

    def put(self, name: str, value: bytes) -> None:
        """Durable when it returns."""
        with _explained(self._path):
            _put(self._db, name, value)

    def close(self) -> None:
        self._db.close()


def _rows(db: sqlite3.Connection) -> list[Fields]:
    """Oldest first."""
    return db.execute(f"SELECT {_COLUMNS} FROM rows ORDER BY id").fetchall()


def _seen(db: sqlite3.Connection) -> tuple[Histogram, Since]:
    counts, kept, least = db.execute("SELECT counts, kept, least FROM seen").fetchone()
    found = np.frombuffer(counts, "<f8")
    usable = found.shape == (BINS,) and bool(np.isfinite(found).all() and (found >= 0.0).all())
    return Histogram(found if usable else None), Since(kept, least)


def _get(db: sqlite3.Connection, name: str) -> bytes | None:
    row = db.execute('SELECT value FROM "values" WHERE name = ?', (name,)).fetchone()
    return None if row is None else bytes(row[0])


def _put(db: sqlite3.Connection, name: str, value: bytes) -> None:
    with _transaction(db):
        db.execute('INSERT OR REPLACE INTO "values" VALUES (?, ?)', (name, value))


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


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: the ledger cannot be opened: {error.strerror}") from None
    except sqlite3.Error as error:
        if damaged(error):
            raise StoreError(f"{path}: the ledger is damaged; a starting agent replaces it by an empty one") from None
        raise StoreError(f"{path}: the ledger cannot be used: {error}") from None


def _open(path: Path) -> sqlite3.Connection:
    with _explained(path):
        try:
            db = _connect(path)
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if found == "ok":
                return db
            db.close()
        except sqlite3.DatabaseError as error:
            if not damaged(error):
                raise
        return _replace(path)


def _replace(path: Path) -> sqlite3.Connection:
    values = _salvaged(path)
    kept = "goal and rounds are kept" if values else "towards the configured goal"
    log.error("%s: damaged; moved to %s. It is learned anew; %s", path, set_aside(path), kept)
    db = _connect(path)
    for name, value in values:
        _put(db, name, value)
    return db


def _salvaged(path: Path) -> list[tuple[str, bytes]]:
    """The values, if they at least can be read: the goal that was set, and the privacy that is spent."""
    with contextlib.suppress(sqlite3.Error):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", _BUSY_S, uri=True)
        with contextlib.closing(db):
            return db.execute("SELECT name, value FROM \"values\" WHERE typeof(value) = 'blob'").fetchall()
    return []


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, _BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise StoreError(f"{path} was written by a newer Skerry: update this one, or give it another folder")
        if version < SCHEMA:
            from sqlite_utils import Database  # slow to load, and needed once

            _tables(Database(db))
            db.execute(f"PRAGMA user_version = {SCHEMA}")
    except BaseException:
        db.close()
        raise
    return db


def _tables(db: Database) -> None:
    facts = {"u": float, "beta": float, "propensity": float, "least": float, "outcome": str, "kept": int, "cost": int}
    features = {"p": float, "position": int, "reply_seconds": float}
    with db.conn:
        db.table("rows").create({"id": int, **facts, **features}, pk="id", if_not_exists=True, strict=True)
        db.table("values").create({"name": str, "value": bytes}, pk="name", if_not_exists=True, strict=True)
        seen = {"one": int, "counts": bytes, "kept": int, "least": float}
        db.table("seen").create(seen, pk="one", if_not_exists=True, strict=True)
        db.table("seen").insert({"one": 1, "counts": bytes(8 * BINS), "kept": 0, "least": 1.0}, ignore=True)
