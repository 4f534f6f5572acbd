"""Keeps the memory within its bytes and its age."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from agent.memory.memory_state import MemoryClock, State
from agent.memory.store import Store

_AGEING_S = 3600.0  # between two looks for old entries
_ROOM = 0.05  # share of the bound that an eviction makes free
_PAGE_ROOM = 8180  # bytes of a page that rows can have
_PAGE = 8192
_BESIDE_KEY = 78  # bytes of a row of `keys`: signature and headers
_ENTRY = 95  # bytes of a row of `entries` and its place in the index of identities
_SEGMENT = 380  # bytes per entry of annoy's file
_FIXED = 160 * 1024  # bytes of a database with nothing in it, and of what lies beside it
_LOOSE = 1.1  # times its computed size that a file may have before it is rewritten


def file_bytes(width: int) -> float:
    """Of the database, per entry with a key of this many dimensions."""
    row = width + _BESIDE_KEY
    return (_PAGE / (_PAGE_ROOM // row) if row <= _PAGE_ROOM else row + _PAGE / 2) + _ENTRY


def log_bytes(max_bytes: int) -> int:
    """Of SQLite's log at rest, in a memory of at most `max_bytes`."""
    return max(65_536, max_bytes // 64)


def disk_bytes(folder: Path) -> int:
    """Of everything in the memory's folder but a file set aside as damaged."""
    sizes = 0
    for path in folder.iterdir():
        if not path.name.startswith("damaged-"):
            try:
                sizes += path.stat().st_size
            except FileNotFoundError:
                continue  # a segment that was merged just now
    return sizes


class Bounds:
    """`tend` belongs to the writer's thread. `max_age`: seconds of the memory's clock."""

    def __init__(
        self,
        folder: Path,
        state: State,
        clock: MemoryClock,
        max_bytes: int,
        max_age: float,
        dropped: Callable[[], None],
    ) -> None:
        """`dropped` is called when entries went."""
        self._folder = folder
        self._state = state
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._dropped = dropped
        self._aged_at = -math.inf
        self._compacted = 0.0  # bytes that compacting left, so that it isn't tried in vain
        self.compact_next = False

    def tend(self, store: Store) -> None:
        now = self._clock.now()
        if now >= self._aged_at + _AGEING_S:
            self._aged_at = now
            self._state.counts.aged += self._drop(store, store.older_than(int(now - self._max_age)))
        database, segments, entries = self._computed()
        fixed = _FIXED + 2 * log_bytes(self._max_bytes)
        excess = fixed + database + segments - self._max_bytes
        if excess > 0 and entries:
            share = (excess + _ROOM * self._max_bytes) / (database + segments)
            least = store.least_useful(math.ceil(share * entries), int(now))
            self._state.counts.evicted += self._drop(store, least)
            database = self._computed()[0]
        self._compact(store, _FIXED + _LOOSE * database)

    def _computed(self) -> tuple[float, float, int]:
        """Bytes that the entries should take in the database and in segments, and how many there are."""
        counts = self._state.rows.counts("space")
        widths = {partition.ref: partition.width for partition in list(self._state.partitions.values())}
        database = sum(counts.get(ref, 0) * file_bytes(width) for ref, width in widths.items())
        entries = sum(counts.values())
        return database, float(_SEGMENT * entries), entries

    def _drop(self, store: Store, found: list[int]) -> int:
        if found:
            store.apply([lambda store: store.delete(found)])
            self._state.release(self._state.drop(np.array(found, np.int64)))
            self._dropped()
        return len(found)

    def _compact(self, store: Store, loose: float) -> None:
        """Slots are used again, so the file has holes only after a change of model, of the bound, or a `clear`."""
        size = store.path.stat().st_size
        needed = size > loose and size > 1.02 * self._compacted and disk_bytes(self._folder) > self._max_bytes
        if self.compact_next or needed:
            self.compact_next, self._compacted = False, size
            store.compact()
            self._compacted = store.path.stat().st_size
