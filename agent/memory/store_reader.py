"""Reading the memory's database beside its writer: WAL lets neither wait for the other."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.memory.memory_rows import SLOT, tail_bytes
from protocol.memory import Entry

_STEP = 32  # slots per statement come in multiples of this, so that few statements are parsed
_SELECT = """SELECT e.id, s.space, k.key, e.tail, e.token, e.p, e.count, e.time, o.origin, k.signature
    FROM entries e JOIN keys k USING (slot) JOIN spaces s ON s.ref = e.space JOIN origins o ON o.ref = e.origin"""


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", timeout=5.0, uri=True, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA cache_size = -1000")
    return connection


def whole_entries(connection: sqlite3.Connection, where: str = "", *parameters: object) -> Iterator[tuple[int, Entry]]:
    """Ids and entries as they were signed."""
    for id, space, key, tail, *facts, origin, signature in connection.execute(f"{_SELECT} {where}", parameters):
        token, p, count, time = facts
        yield id, Entry(space, key, tail_bytes(tail & (1 << 64) - 1), token, p, count, time, origin, signature)


class Readers:
    """As many connections as threads that read at once. Thread-safe; sqlite3.Error where the file can't be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    def keys(self, slots: Sequence[int]) -> list[tuple[int, bytes]]:
        """Keys by slot, as many as there are, in any order."""
        connection = self._take()
        padded = [*slots, *[-1] * (-len(slots) % _STEP)]
        marks = ",".join("?" * len(padded))
        try:
            return connection.execute(f"SELECT slot, key FROM keys WHERE slot IN ({marks})", padded).fetchall()
        finally:
            self._give(connection)

    def entries(self, ids: Sequence[int]) -> dict[int, Entry]:
        connection = self._take()
        try:
            found: dict[int, Entry] = {}
            for id in ids:
                slot = id & SLOT
                found |= whole_entries(connection, "WHERE e.slot = ? AND e.id = ?", slot, id)
            return found
        finally:
            self._give(connection)

    def _take(self) -> sqlite3.Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return connect(self._path)

    def _give(self, connection: sqlite3.Connection) -> None:
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()
