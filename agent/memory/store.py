"""The memory's truth: a SQLite database, written by one thread of one process.

WAL with a sync at every commit, so that what was committed survives a power loss. Layout and sizes: `store_schema`.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from agent.memory.memory_rows import FIELDS, SLOT, SLOT_BITS
from protocol.errors import StoreError
from protocol.memory import Entry

SCHEMA = 1
_PAGE = 8192  # bytes: 12 keys of 576 dimensions with their signatures fill 95 % of one
_BUSY_S = 5.0
_REFUSED = 10_000  # entries that proved wrong and are remembered

_HALF_LIFE = 30 * 86_400.0
_USEFULNESS = f"trust * (1 + hits + min(count - 1, 8) / 4.0) / (1 + max(:now - used, 0) / {_HALF_LIFE})"
"""What is evicted last: trusted, often reused here, seen by its origin more than once (a claim, so it counts little)
and of use lately: unused for 30 days halves it, for 60 days leaves a third. Of equals the oldest goes first."""

Write = Callable[["Store"], object]


def identity_of(entry: Entry) -> int:
    """The same for all reports of one fact by one origin: 64 bits of BLAKE2b, signed, over everything but
    probability, count, time and signature."""
    hashed = blake2b(entry.space + entry.tail + entry.token.to_bytes(8, "little") + entry.origin, digest_size=8)
    hashed.update(entry.key)
    return int.from_bytes(hashed.digest(), "little", signed=True)


def signed(code: int) -> int:
    """An unsigned 64-bit number as SQLite keeps it."""
    return code - (1 << 64) if code >> 63 else code


def damaged(error: sqlite3.Error) -> bool:
    """Whether the file is not a database or no longer one, as opposed to a disk that is full or fails."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def troubled(error: sqlite3.Error) -> bool:
    """Whether the disk failed, is full or busy: the same write may succeed later."""
    return isinstance(error, sqlite3.OperationalError) and not damaged(error)


@dataclass(slots=True)
class Origin:
    """A device that entries came from. `audits` and `wrong` are sums that their keeper may let decay."""

    ref: int
    audits: float = 0.0
    wrong: float = 0.0
    quarantined: bool = False
    dropped: int = 0  # entries that went when it was quarantined

    @property
    def unknown(self) -> bool:
        return not self.audits and not self.quarantined


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """What must hold of a segment's file, the ids in it in the order of its items, and what it projects onto."""

    ref: int
    space: int
    size: int
    sha256: bytes
    recipe: str
    ids: bytes
    axes: bytes


class Store:
    """The writing connection. Its methods may be called from one thread at a time; sqlite3.Error tells what went
    wrong."""

    def __init__(self, path: Path, log_bytes: int) -> None:
        """`log_bytes`: at which the log is copied back. Raises StoreError if the schema is newer than this program."""
        self.path = path
        self.log_bytes = log_bytes
        self._connection = sqlite3.connect(path, _BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        version = self._value("PRAGMA user_version")
        if version > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer Skerry (schema {version}, this one knows {SCHEMA}): "
                "update Skerry, or give it another folder"
            )
        for pragma in (f"page_size = {_PAGE}", "journal_mode = WAL", "synchronous = FULL", "cache_size = -2000"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(f"PRAGMA wal_autocheckpoint = {max(1, self.log_bytes // _PAGE)}")
        self._connection.execute(f"PRAGMA journal_size_limit = {self.log_bytes}")
        if version < SCHEMA:
            from sqlite_utils import Database

            from agent.memory.store_schema import MIGRATIONS

            MIGRATIONS.apply(Database(self._connection))
            self._connection.execute(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        """The last connection to close also removes the log."""
        self._connection.close()

    def _value(self, query: str, *parameters: object) -> int:
        row = self._connection.execute(query, parameters).fetchone()
        return int(row[0]) if row else 0

    # What is read when the memory opens

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Of all entries, fields as in `memory_rows.FIELDS`."""
        return self._connection.execute(f"SELECT {', '.join(FIELDS)} FROM entries")

    def state(self) -> tuple[int, float, float]:
        """Last serial, memory clock and wall clock, in seconds."""
        row: tuple[int, float, float] = self._connection.execute("SELECT serial, seconds, wall FROM state").fetchone()
        return max(row[0], self._value("SELECT coalesce(max(id), 0) FROM entries") >> SLOT_BITS), row[1], row[2]

    def spaces(self) -> list[tuple[int, bytes, int]]:
        return self._connection.execute("SELECT ref, space, width FROM spaces").fetchall()

    def origins(self) -> dict[bytes, Origin]:
        found = self._connection.execute(
            "SELECT origin, ref, audits, wrong, quarantined, dropped FROM origins ORDER BY ref"
        )
        return {row[0]: Origin(row[1], row[2], row[3], bool(row[4]), row[5]) for row in found}

    def refused(self) -> set[int]:
        return {row[0] for row in self._connection.execute("SELECT identity FROM refused")}

    def segments(self) -> list[SegmentRow]:
        found = self._connection.execute(
            "SELECT ref, space, size, sha256, recipe, ids, axes FROM segments ORDER BY ref"
        )
        return [SegmentRow(*row) for row in found]

    def keys(self, slots: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Keys by slot, as many as there are."""
        for slot in slots:
            yield from self._connection.execute("SELECT slot, key FROM keys WHERE slot = ?", (slot,))

    # What is written, each within `apply`

    def apply(self, writes: Sequence[Write]) -> None:
        """All of them durably, or none of them and the sqlite3.Error that one met."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                write(self)
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # on most errors of the disk SQLite has rolled back by itself
                self._connection.execute("ROLLBACK")
            raise

    def save_state(self, serial: int, seconds: float, wall: float) -> None:
        self._connection.execute("UPDATE state SET serial = ?, seconds = ?, wall = ?", (serial, seconds, wall))

    def save_origin(self, origin: bytes, now: Origin) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO origins VALUES (?, ?, ?, ?, ?, ?)",
            (now.ref, origin, now.audits, now.wrong, now.quarantined, now.dropped),
        )

    def insert(self, id: int, identity: int, code: int, entry: Entry, space: int, origin: int, seconds: int) -> None:
        """`space` and `origin`: their refs, which become known with the first entry that has them."""
        slot = id & SLOT
        spaced = (space, entry.space, len(entry.key))
        self._connection.execute("INSERT OR IGNORE INTO spaces VALUES (?, ?, ?)", spaced)
        self._connection.execute("INSERT OR IGNORE INTO origins VALUES (?, ?, 0, 0, 0, 0)", (origin, entry.origin))
        values = (slot, id, space, identity, signed(code), entry.token, entry.p, entry.count, entry.time, origin)
        # An older report of the same may still wait for its deletion, which then finds another id.
        self._connection.execute("DELETE FROM entries WHERE identity = ?", (identity,))
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1.0, 0, ?, ?)", (*values, seconds, seconds)
        )
        self._connection.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", (slot, entry.key, entry.signature))

    def renew(self, id: int, entry: Entry, seconds: int) -> None:
        """Its origin has seen it again: a new count, and what was signed with it."""
        slot = id & SLOT
        self._connection.execute(
            "UPDATE entries SET p = ?, count = ?, time = ?, renewed = ? WHERE slot = ? AND id = ?",
            (entry.p, entry.count, entry.time, seconds, slot, id),
        )
        self._connection.execute("UPDATE keys SET signature = ? WHERE slot = ?", (entry.signature, slot))

    def hit(self, ids: Iterable[int], seconds: int) -> None:
        found = list(ids)
        self._update("hits = hits + 1, used = ?", [(seconds,)] * len(found), found)

    def confirm(self, trusts: dict[int, float], seconds: int) -> None:
        """New trust of entries that were confirmed, which makes them young again."""
        self._update("trust = ?, renewed = ?", [(trust, seconds) for trust in trusts.values()], list(trusts))

    def distrust(self, trusts: dict[int, float]) -> None:
        self._update("trust = ?", [(trust,) for trust in trusts.values()], list(trusts))

    def _update(self, change: str, values: Sequence[tuple[object, ...]], ids: Sequence[int]) -> None:
        self._connection.executemany(
            f"UPDATE entries SET {change} WHERE slot = ? AND id = ?",
            [(*row, id & SLOT, id) for row, id in zip(values, ids, strict=True)],
        )

    def delete(self, ids: Iterable[int]) -> None:
        """Keys stay in their slots until others take them or `compact` runs: emptying slots all over the file would
        write the whole file."""
        slots = [(id & SLOT, id) for id in ids]
        self._connection.executemany("DELETE FROM entries WHERE slot = ? AND id = ?", slots)

    def refuse(self, identities: Iterable[int], seconds: int) -> None:
        """Entries that proved wrong don't come back with the next gossip."""
        rows = [(identity, seconds) for identity in identities]
        self._connection.executemany("INSERT OR REPLACE INTO refused VALUES (?, ?)", rows)
        self._connection.execute(
            "DELETE FROM refused WHERE identity IN (SELECT identity FROM refused ORDER BY at DESC LIMIT -1 OFFSET ?)",
            (_REFUSED,),
        )

    def forget_refused(self) -> None:
        self._connection.execute("DELETE FROM refused")

    def quarantine(self, origin: bytes, now: Origin) -> None:
        """The origin's entries go; their number goes into `now.dropped`."""
        now.dropped = self._connection.execute("DELETE FROM entries WHERE origin = ?", (now.ref,)).rowcount
        self.save_origin(origin, now)

    def delete_origins(self, refs: Iterable[int]) -> None:
        self._connection.executemany("DELETE FROM origins WHERE ref = ?", [(ref,) for ref in refs])

    def put_segment(self, new: SegmentRow | None, replaced: Iterable[int]) -> None:
        self._connection.executemany("DELETE FROM segments WHERE ref = ?", [(ref,) for ref in replaced])
        if new is not None:
            values = (new.ref, new.space, new.size, new.sha256, new.recipe, new.ids, new.axes)
            self._connection.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    # Ageing, eviction and space

    def least_useful(self, count: int, seconds: int) -> list[int]:
        found = self._connection.execute(
            f"SELECT id FROM entries ORDER BY {_USEFULNESS}, id LIMIT :count", {"now": seconds, "count": count}
        )
        return [row[0] for row in found]

    def older_than(self, seconds: int) -> list[int]:
        return [row[0] for row in self._connection.execute("SELECT id FROM entries WHERE renewed < ?", (seconds,))]

    def compact(self) -> None:
        """Rewrites the file without its holes, outside of a transaction; needs its size again for that while."""
        self._connection.execute("DELETE FROM keys WHERE slot NOT IN (SELECT slot FROM entries)")
        self._connection.execute("VACUUM")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def check(self) -> None:
        """Raises an error that is `damaged` if the file is. Reads it all."""
        (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            error = sqlite3.DatabaseError(found)
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
