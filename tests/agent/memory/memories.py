"""Small memories and entries for the tests of the store."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.memory.memory import EntryMemory
from agent.memory.segments_build import build
from protocol.memory import Entry

SPACE = b"one model's space"[:16]
ORIGIN = b"o" * 32
WIDTH = 32
PATIENCE = 60.0  # seconds that anything may take before a test fails

Keys = NDArray[np.int8]


def keys(count: int, *, width: int = WIDTH, seed: int = 0) -> Keys:
    """(count, width) int8, independent of each other."""
    drawn = np.random.default_rng(seed).integers(-127, 128, (count, width))
    drawn[:, 0] |= 1  # none of them is zero
    return drawn.astype(np.int8)


def tail(number: int) -> bytes:
    """(8 bytes) No two numbers share even the last token."""
    return (number + 1).to_bytes(8, "little")


def entry(number: int, key: Keys, **changes: object) -> Entry:
    """The `number`th entry, which is also its token."""
    fields = {
        "space": SPACE,
        "key": key.tobytes(),
        "tail": tail(number),
        "token": number,
        "p": 0.5,
        "count": 1,
        "time": 1_760_000_000,
        "origin": ORIGIN,
        "signature": bytes(64),
    }
    return Entry(**(fields | changes))  # type: ignore[arg-type]


def entries(found: Keys, *, first: int = 0, **changes: object) -> list[Entry]:
    return [entry(first + n, key, **changes) for n, key in enumerate(found)]


def tokens(memory: EntryMemory, key: Keys, k: int = 1, space: bytes = SPACE, end: bytes = bytes(8)) -> list[int]:
    return [near.token for near in memory.neighbours(space, key, end, k)]


def stored(folder: Path) -> dict[int, int]:
    """Ids and tokens of the entries in a memory's database."""
    with closing(sqlite3.connect(folder / "memory.db")) as connection:
        return dict(connection.execute("SELECT id, token FROM entries"))


def indexed(memory: EntryMemory) -> list[int]:
    """Ids of the living entries that the index can find, however often it holds them."""
    state = memory._state
    found: list[int] = []
    for partition in state.partitions.values():
        segments, recent = partition.view()
        for ids in (*(segment.ids for segment in segments), recent.ids):
            found += ids[state.rows.alive(ids)].tolist()
    return sorted(found)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def opened(folder: Path, **options: object) -> EntryMemory:
    """Segments come early, and are built in this process, which is faster than in another one."""
    return EntryMemory(folder, **({"tail_limit": 100, "build": build} | options))  # type: ignore[arg-type]
