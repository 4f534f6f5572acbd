"""What all rounds of an edge keep on disk alike: numbers that only grow, the history of what was agreed, orders from
`skerry edge`, who was refused and why, and the epsilon ledger. One SQLite database (WAL) each.

Numbers, rounds and what was agreed are synced to the disk at each commit.
"""

from __future__ import annotations

import logging
import math
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from protocol.errors import StoreError
from protocol.folder_lock import FolderLock
from protocol.rounds import MAX_JUMP, MAX_NUMBER
from protocol.set_aside import set_aside
from server.edge.epsilon import Releases
from server.edge.folder import DATABASE, LOCK

if TYPE_CHECKING:
    from sqlite_utils.migrations import Migrations

log = logging.getLogger(__name__)

SCHEMA = 1
LATELY = 3  # rounds
_RELEASES = 262_144  # devices in the epsilon ledger; further ones are counted together
_LIFTS = 4096
_REFUSALS = 65_536  # rows
_BUSY_SECONDS = 5.0


@dataclass(slots=True)
class State:
    """`number`, `round`: the last that were given out; the next are above `heard_number` and `heard_round` too.
    `floor`: updates of rounds up to it are not known any more. `collecting`: a round is under way. `began`, `ends`,
    `next`, `seconds`: times on the edge's own clock, which stands still while it is not connected; of the present
    round, its deadline, the next round, and now. `held`: no new rounds."""

    number: int
    round: int
    collecting: int
    began: float
    ends: float
    next: float
    heard_number: int
    heard_round: int
    floor: int
    held: int
    seconds: float


_STATE = ", ".join(field.name for field in fields(State))


class Order(NamedTuple):
    """From `skerry edge`: `round`, `rollback` (to `number`), `hold` or `resume`."""

    id: int
    kind: str
    number: int | None


class Entry(NamedTuple):
    """Of the history. `why`: `round`, `rollback` or `found` (at the broker). `of`: the number under which the content
    was first agreed."""

    number: int
    round: int
    why: str
    of: int
    devices: int


class NumberStore(ABC):
    """Used by one thread at a time, and by one process. Raises StoreError, StoreInUse; a damaged database is moved
    aside. Later failures of the disk are sqlite3.Error, and leave everything as it was."""

    def __init__(self, folder: Path) -> None:
        self._lock = FolderLock(folder, LOCK, "the edge's", "edge.folder")
        try:
            self._db = _opened(folder / DATABASE, self._migrations)
        except BaseException:
            self._lock.close()
            raise
        self.state = read_state(self._db)
        self._count()

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    @staticmethod
    @abstractmethod
    def _migrations() -> Migrations:
        """Of the tables: those that all have, and its own. Slow to load, so it is asked for only where it is needed."""

    def _count(self) -> None:
        self._released = self._value("SELECT count(*) FROM releases")

    @contextmanager
    def transaction(self) -> Iterator[State]:
        """The state to change, and all of what is done meanwhile: on the disk afterwards, or nothing of it."""
        state = replace(self.state)
        self._db.execute("PRAGMA synchronous = FULL")  # which also brings earlier commits to the disk
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield state
            marks = ", ".join("?" for _ in fields(State))
            self._db.execute(f"UPDATE state SET ({_STATE}) = ({marks})", astuple(state))
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._db.execute("PRAGMA synchronous = NORMAL")
        self.state = state

    # Refusals, noise and numbers that others know

    def released(self, device: str, noise: float) -> None:
        """For the epsilon ledger: the device has sent a threshold with that noise, whether it is taken or not."""
        told = (0, 1, noise**-2) if noise else (1, 0, 0.0)
        more = "plain = plain + ?, noisy = noisy + ?, spent = spent + ?"
        if not self._db.execute(f"UPDATE releases SET {more} WHERE device = ?", (*told, device)).rowcount:
            name = device if self._released < _RELEASES else ""
            insert = f"INSERT INTO releases VALUES (?, ?, ?, ?) ON CONFLICT (device) DO UPDATE SET {more}"
            self._db.execute(insert, (name, *told, *told))
            self._released += 1

    def noisy_releases(self) -> Iterator[Releases]:
        return releases(self._db)

    def refuse(self, refusals: Mapping[tuple[str, str], int]) -> None:
        """Adds to the counts by device and reason; past the most that are kept, only to those by reason."""
        room = self._value("SELECT count(*) FROM refusals") < _REFUSALS
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT INTO refusals VALUES (?, ?, ?) "
                "ON CONFLICT (device, reason) DO UPDATE SET count = count + excluded.count",
                [(device if room else "", reason, count) for (device, reason), count in refusals.items()],
            )
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def lift(self, device: str, number: int, round: int) -> bool:
        """A device knows higher numbers than the edge: after a loss of the database they are its own. Each device is
        heeded once, and then up to MAX_JUMP, so that a few can't use the numbers up."""
        known = self._value("SELECT count(*) FROM lifts WHERE device = ?", device)
        if known or self._value("SELECT count(*) FROM lifts") >= _LIFTS:
            return False
        with self.transaction() as state:
            self._db.execute("INSERT INTO lifts VALUES (?)", (device,))
            _hear(state, min(number, state.number + MAX_JUMP), min(round, state.round + MAX_JUMP))
        return True

    def hear(self, number: int, round: int) -> None:
        """What the broker kept of the edge's own is what it said."""
        with self.transaction() as state:
            _hear(state, number, round)

    # What was agreed

    def history(self) -> list[Entry]:
        """Newest first."""
        return history(self._db)

    def _content(self, number: int | None = None) -> bytes | None:
        """Under `number` in the history; None: the present one."""
        query = "SELECT content FROM history WHERE number = coalesce(?, (SELECT max(number) FROM history))"
        row = self._db.execute(query, (number,)).fetchone()
        return row[0] if row else None

    def _remember(self, entry: Entry, content: bytes, most: int) -> None:
        """In a transaction: a new number, of which the history keeps `most`."""
        self._db.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?)", (*entry, content))
        self._db.execute(
            "DELETE FROM history WHERE number NOT IN (SELECT number FROM history ORDER BY number DESC LIMIT ?)", (most,)
        )

    # Orders

    def orders(self) -> list[Order]:
        return orders(self._db)

    def done(self, order: Order) -> None:
        """In a transaction."""
        self._db.execute("DELETE FROM orders WHERE id = ?", (order.id,))

    def _value(self, query: str, *parameters: object) -> int:
        return int(self._db.execute(query, parameters).fetchone()[0])


def read_state(db: sqlite3.Connection) -> State:
    return State(*db.execute(f"SELECT {_STATE} FROM state").fetchone())


def history(db: sqlite3.Connection) -> list[Entry]:
    rows = db.execute("SELECT number, round, why, of, devices FROM history ORDER BY number DESC")
    return [Entry(*row) for row in rows]


def orders(db: sqlite3.Connection) -> list[Order]:
    return [Order(*row) for row in db.execute("SELECT id, kind, number FROM orders ORDER BY id")]


def releases(db: sqlite3.Connection) -> Iterator[Releases]:
    """Updates of each device ("": all further ones) with noise, as so many with the same one, which give away as much;
    and those without."""
    for device, plain, noisy, spent in db.execute("SELECT device, plain, noisy, spent FROM releases"):
        if noisy:
            yield Releases(device, math.sqrt(noisy / spent), noisy)
        if plain:
            yield Releases(device, 0.0, plain)


def _hear(state: State, number: int, round: int) -> None:
    state.heard_number = min(max(state.heard_number, number), MAX_NUMBER - 1)
    state.heard_round = min(max(state.heard_round, round), MAX_NUMBER - 1)


def _opened(path: Path, migrations: Callable[[], Migrations]) -> sqlite3.Connection:
    try:
        return _connected(path, migrations)
    except sqlite3.OperationalError as error:
        raise StoreError(f"{path}: the rounds cannot be opened: {error}") from None
    except sqlite3.DatabaseError:
        aside = set_aside(path)
        log.error("%s: damaged; moved to %s: the edge goes on with what the broker and the devices know", path, aside)
        return _connected(path, migrations)


def _connected(path: Path, migrations: Callable[[], Migrations]) -> sqlite3.Connection:
    connection = sqlite3.connect(path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise StoreError(
                f"{path} was written by a newer Skerry (schema {version}, this one knows {SCHEMA}): update Skerry, or "
                "give the edge another folder (edge.folder)"
            )
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "journal_size_limit = 4194304"):
            connection.execute(f"PRAGMA {pragma}")
        if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        if version < SCHEMA:
            from sqlite_utils import Database

            migrations().apply(Database(connection))
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection
