"""The outbox's file: one SQLite table, written in transactions that survive a power cut (WAL, synchronous=FULL)."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import StoreError, StoreInUse
from protocol.set_aside import set_aside

if TYPE_CHECKING:
    from sqlite_utils import Database

log = logging.getLogger(__name__)

_ROW_BYTES = 64  # of a row beside topic and payload, about


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that waits. `at`: seconds on the outbox's own clock, which runs only while it is open."""

    id: int
    topic: str
    payload: bytes
    priority: int
    retain: bool
    at: float

    @property
    def size(self) -> int:
        return len(self.topic.encode()) + len(self.payload) + _ROW_BYTES


class LetterFile:
    """Used by one thread. `bytes` and `count`: what the file holds. `seconds`: its clock when it was last written.

    Raises StoreError if the file can't be opened; a damaged one is moved aside. Later failures of the disk are
    sqlite3.Error, and leave everything as it was.
    """

    def __init__(self, path: Path) -> None:
        self.seconds: float
        self.last_id: int
        self.count: int
        self.bytes: int
        self._db = _open(path)
        (self.seconds,) = self._db.execute("select seconds from clock").fetchone()
        (self.last_id,) = self._db.execute("select coalesce(max(id), 0) from letters").fetchone()
        self.count, self.bytes = self._db.execute("select count(*), coalesce(sum(size), 0) from letters").fetchone()

    def after(self, id: int, limit: int) -> list[Letter]:
        rows = self._db.execute(
            "select id, topic, payload, priority, retain, at from letters where id > ? order by id limit ?", (id, limit)
        )
        return [Letter(row[0], row[1], row[2], row[3], bool(row[4]), row[5]) for row in rows]

    def write(
        self, new: Sequence[Letter], gone: Iterable[int], seconds: float, oldest: float, most_bytes: int
    ) -> tuple[int, int]:
        """Adds `new`, deletes `gone` and what is from before `oldest`, then, down to `most_bytes`, what matters least.

        All of it or nothing, and on the disk when this returns: how many were too old, and how many were too many.
        """
        try:
            self._db.execute("begin immediate")
            self._db.executemany(
                "insert into letters (id, topic, payload, priority, retain, at, size) values (?, ?, ?, ?, ?, ?, ?)",
                [(x.id, x.topic, x.payload, x.priority, int(x.retain), x.at, x.size) for x in new],
            )
            sent = self._delete(gone)
            aged = self._db.execute("delete from letters where at < ? returning size", (oldest,)).fetchall()
            total = self.bytes + sum(x.size for x in new) - sum(sent) - sum(size for (size,) in aged)
            crowded = self._delete(self._least(total - most_bytes))
            self._db.execute("update clock set seconds = ?", (seconds,))
            self._db.execute("commit")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise
        self.seconds = seconds
        self.bytes = total - sum(crowded)
        self.count += len(new) - len(sent) - len(aged) - len(crowded)
        return len(aged), len(crowded)

    def _delete(self, ids: Iterable[int]) -> list[int]:
        """The sizes of those that were there."""
        found = (self._db.execute("delete from letters where id = ? returning size", (id,)).fetchall() for id in ids)
        return [size for rows in found for (size,) in rows]

    def _least(self, excess: int) -> list[int]:
        """Who has to go: the lowest priority first, of one priority the oldest."""
        least: list[int] = []
        if excess > 0:
            for id, size in self._db.execute("select id, size from letters order by priority, id"):
                least.append(id)
                excess -= size
                if excess <= 0:
                    break
        return least

    def close(self) -> None:
        self._db.close()


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _connect(path)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreInUse(f"{path}: in use by another process; stop it, or choose another folder") from None
        raise StoreError(f"{path}: the outbox cannot be opened: {error}") from None
    except OSError as error:
        raise StoreError(f"{path}: the outbox cannot be opened: {error.strerror}") from None
    except sqlite3.DatabaseError:
        log.error("%s: damaged; moved to %s, and what waited in it is not sent", path, set_aside(path))
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.0)
    try:
        connection.execute("pragma locking_mode = exclusive")
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        connection.execute("pragma journal_size_limit = 1048576")
        connection.execute("begin immediate")  # takes the lock for good
        connection.execute("commit")
        if connection.execute("pragma quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        from sqlite_utils import Database  # takes a tenth of a second, which a device without a broker need not wait

        _tables(Database(connection))
    except BaseException:
        connection.close()
        raise
    return connection


def _tables(db: Database) -> None:
    with db.conn:
        db.table("letters").create(
            {"id": int, "topic": str, "payload": bytes, "priority": int, "retain": int, "at": float, "size": int},
            pk="id",
            if_not_exists=True,
            strict=True,
        )
        db.table("letters").create_index(["priority", "id", "size"], if_not_exists=True)
        db.table("clock").create({"one": int, "seconds": float}, pk="one", if_not_exists=True, strict=True)
        db.table("clock").insert({"one": 1, "seconds": 0.0}, ignore=True)
