"""The rounds of an edge as an operator sees and steers them: through the database, whether it is running or not."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from protocol.errors import RequestError, StoreError
from protocol.folder_lock import holder
from server.edge.epsilon import Releases
from server.edge.folder import DATABASE, LOCK
from server.edge.levels import Kept
from server.edge.number_store import LATELY, SCHEMA, Entry, Order, State, history, orders, read_state, releases

_BUSY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Rounds:
    """Of whatever kind. `process`: that serves the cluster, if one does. `refusals`: by device ("": others) and reason.
    `left`, `next`: seconds until the round's deadline and until the next round, on the edge's own clock."""

    process: int | None
    state: State
    refusals: dict[str, dict[str, int]]
    history: list[Entry]
    orders: list[Order]

    @property
    def left(self) -> float:
        return max(0.0, self.state.ends - self.state.seconds) if self.state.collecting else 0.0

    @property
    def next(self) -> float:
        return math.inf if self.state.held else max(0.0, self.state.next - self.state.seconds)

    def reasons(self) -> dict[str, int]:
        """Refusals of all devices together."""
        return reasons(self.refusals)


@dataclass(frozen=True, slots=True)
class Overview(Rounds):
    """`devices`: of which updates are kept; `lately`: that took part in the last rounds; `waiting`: whose updates no
    aggregate has yet."""

    devices: int
    lately: int
    waiting: int
    subjects: dict[str, Kept]
    overall: int


def overview(folder: Path) -> Overview:
    """Raises StoreError."""
    with database(folder) as db:
        state = read_state(db)
        newest = db.execute("SELECT content FROM history ORDER BY number DESC LIMIT 1").fetchone()
        last = max(0, state.round - LATELY - state.collecting)
        return Overview(
            *rounds_of(folder, db, state),
            devices=_value(db, "SELECT count(DISTINCT device) FROM updates"),
            lately=_value(db, "SELECT count(DISTINCT device) FROM updates WHERE counted > ?", last),
            waiting=_value(db, "SELECT count(DISTINCT device) FROM updates WHERE counted = 0"),
            subjects=msgspec.json.decode(newest[0], type=dict[str, Kept]) if newest else {},
            overall=_value(db, "SELECT coalesce(max(number), 0) FROM overall"),
        )


def rounds_of(
    folder: Path, db: sqlite3.Connection, state: State
) -> tuple[int | None, State, dict[str, dict[str, int]], list[Entry], list[Order]]:
    """The fields of Rounds, in their order."""
    return holder(folder, LOCK), state, refusals(db), history(db), orders(db)


def noisy_releases(folder: Path) -> list[Releases]:
    """What every device has released, for the epsilon ledger. Raises StoreError."""
    with database(folder) as db:
        return list(releases(db))


def order(folder: Path, *kinds: str, number: int | None = None) -> Sequence[int]:
    """Leaves orders for the edge, all or none; their ids. Raises StoreError."""
    with database(folder) as db:
        db.execute("BEGIN IMMEDIATE")
        ids = []
        for kind in kinds:
            target = number if kind == "rollback" else None
            ids.append(db.execute("INSERT INTO orders (kind, number) VALUES (?, ?)", (kind, target)).lastrowid or 0)
        db.execute("COMMIT")
        return ids


def waiting_orders(folder: Path) -> list[int]:
    """Ids of the orders that the edge has not done yet. Raises StoreError."""
    with database(folder) as db:
        return [waiting.id for waiting in orders(db)]


def has_rounds(folder: Path) -> bool:
    return (folder / DATABASE).exists()


def past(history: Sequence[Entry], number: int | None) -> Entry:
    """What a rollback to `number` returns to; None: to what was agreed before the present. Raises RequestError."""
    if not history:
        raise RequestError("nothing was agreed yet: there is nothing to roll back")
    if number is not None:
        for entry in history:
            if entry.number == number:
                return entry
        kept = ", ".join(str(entry.number) for entry in history)
        raise RequestError(f"number {number} is not in the history, which has {kept}")
    present = history[0].of
    for entry in history:
        if entry.why != "rollback" and entry.of < present:
            return entry
    raise RequestError("the history has nothing from before the present number: name one with --to")


def refusals(db: sqlite3.Connection) -> dict[str, dict[str, int]]:
    """By device and reason."""
    found: dict[str, dict[str, int]] = {}
    for device, reason, count in db.execute("SELECT device, reason, count FROM refusals ORDER BY device, reason"):
        found.setdefault(device, {})[reason] = count
    return found


def reasons(refusals: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for of in refusals.values():
        for reason, count in of.items():
            total[reason] = total.get(reason, 0) + count
    return total


def _value(db: sqlite3.Connection, query: str, *parameters: object) -> int:
    return int(db.execute(query, parameters).fetchone()[0])


@contextmanager
def database(folder: Path) -> Iterator[sqlite3.Connection]:
    """Raises StoreError, for what is done with it too."""
    path = folder / DATABASE
    if not path.exists():
        raise StoreError(f"no edge has kept rounds in {folder}: start `skerry edge`, or name its configuration")
    try:
        db = sqlite3.connect(path, _BUSY_SECONDS, isolation_level=None)
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version != SCHEMA:
                raise StoreError(f"{path} has schema {version}, this Skerry knows {SCHEMA}: use the edge's own version")
            yield db
        finally:
            db.close()
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
