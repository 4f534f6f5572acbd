"""The device's memory: entries in SQLite, an index over them in RAM and in mapped segments.

    learn, add ──► RAM: rows, tail ──► writer's thread ──► SQLite (the truth)
                        │                                      │
    neighbours ◄── exact tail + segments ◄── merges' thread ◄──┘ built in a process of its own

Whatever is judged (trust, quarantine) takes hold in RAM at once, too, and follows to the disk.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

from agent.memory import memory_portable as portable
from agent.memory.base import Key, Neighbour
from agent.memory.memory_admit import Admission, check
from agent.memory.memory_bounds import Bounds, disk_bytes, log_bytes
from agent.memory.memory_judge import Judgement
from agent.memory.memory_lookup import Lookup
from agent.memory.memory_merges import Merges
from agent.memory.memory_open import DATABASE, LOCK, open_store, start_over
from agent.memory.memory_state import MemoryClock, State
from agent.memory.memory_stats import MemoryStats, OriginStats, SpaceStats
from agent.memory.memory_writer import Change, Writer
from agent.memory.segments_build import Builder, ChildBuilder
from agent.memory.store import Store, damaged
from agent.memory.store_reader import Readers
from protocol.folder_lock import FolderLock
from protocol.memory import Entry

MAX_BYTES = 128_000_000
MAX_AGE = 180 * 86_400.0
TAIL_LIMIT = 1024

_BATCH = 1000  # entries per transaction of `add`
_SETTLE_S = 120.0  # that `clear` waits for segments without what was cleared


class EntryMemory:
    """A folder of its own, which one process at a time may open (StoreError: "in use by").

    Threads may share it. `neighbours`, `learn` and everything that judges entries or origins never wait for the disk;
    `flush`, `add`, `clear`, `export` and `import_` do, and raise StoreError if it refuses.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = MAX_BYTES,
        max_age: float = MAX_AGE,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        tail_limit: int = TAIL_LIMIT,
        build: Builder | None = None,
    ) -> None:
        """`max_bytes`: on disk, index included; while segments are merged the new one comes on top. `max_age`: seconds
        of running time since an entry was learned or confirmed. `tail_limit`: entries that a new segment is built of.
        """
        self.folder = folder
        self._closed = False
        self._lock_file = FolderLock(folder, LOCK, "the memory's", "device.folder")
        self._child = ChildBuilder()
        try:
            self._state = State()
            store, writes = open_store(folder, self._state, log_bytes(max_bytes))
            _, seconds, left = store.state()
        except BaseException:
            self._lock_file.close()
            raise
        self._clock = MemoryClock(clock, wall, seconds, left or None)
        self._max_bytes = max_bytes
        self._tail_limit = tail_limit
        self._bounds = Bounds(folder, self._state, self._clock, max_bytes, max_age, self._look)
        self._writer = Writer(store, epilogue=self._save_state, tend=self._bounds.tend, replace=self._replace)
        self._merges = Merges(folder, self._state, self._writer, build or self._child, tail_limit)
        self._admission = Admission(self._state, self._writer, self._clock)
        self._judgement = Judgement(self._state, self._writer, self._clock)
        self._lookup = Lookup(self._state, Readers(store.path), self._suspect)
        for write in writes:
            self._writer.put(Change(write))
        self._writer.start()
        self._merges.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is not durable yet. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._merges.stop()
        self._child.stop()
        self._merges.join()
        self._lookup.readers.close()
        self._writer.close()
        self._lock_file.close()

    # Looking up

    def neighbours(self, space: bytes, key: Key, tail: bytes, k: int) -> list[Neighbour]:
        """Candidates are what the index finds near, and what shares the last 2 tokens or more; exact cosines order
        them."""
        return self._lookup.neighbours(space, key, tail, k)

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """As their origins signed them, those that are still there."""
        return self._lookup.entries(ids)

    # Learning

    def learn(self, entry: Entry) -> None:
        """Raises ProtocolError if the entry is malformed. If the disk has refused for long, it is not kept."""
        check(entry)
        self._admission.learn(entry)
        self._look_at_tail(entry)

    def add(self, entries: Sequence[Entry]) -> int:
        """Raises ProtocolError if one is malformed, and then adds none; StoreError if they can't be made durable."""
        for entry in entries:
            check(entry)
        new = 0
        for start in range(0, len(entries), _BATCH):
            new += self._admission.add(entries[start : start + _BATCH])
            self._look_at_tail(entries[start])
        return new

    def flush(self) -> None:
        """All that was learned and judged so far is durable when this returns."""
        self._writer.flush()

    def settle(self, timeout: float | None = None) -> bool:
        """Waits for the background's merges; False if they take longer than `timeout` seconds."""
        return self._merges.settle(timeout)

    # Judging

    def used(self, ids: Iterable[int]) -> None:
        """They answered a step: that makes them useful."""
        self._judgement.used(ids)

    def confirm(self, ids: Iterable[int]) -> None:
        """The LLM says the same: they gain trust, and are as young as new ones."""
        self._judgement.confirm(ids)

    def blame(self, ids: Iterable[int]) -> None:
        """The LLM says something else: they lose trust; below a floor they go, and don't come back."""
        if self._judgement.blame(ids):
            self._merges.look()

    def note_audit(self, origin: bytes, wrong: bool, keep: float = 1.0) -> None:
        """An entry of the origin was compared with the LLM. `keep`: how much of the record so far still counts."""
        self._judgement.note_audit(origin, wrong, keep)

    def origin_record(self, origin: bytes) -> tuple[float, float]:
        """Audits, and how many of them found it wrong."""
        known = self._state.origins.get(origin)
        return (known.audits, known.wrong) if known else (0.0, 0.0)

    def forget_origin(self, origin: bytes) -> None:
        """Quarantine: its entries are found no more and go; what it sends later is refused. `clear` lifts that."""
        self._judgement.quarantine(origin)

    # Looking after it

    def origins(self) -> list[OriginStats]:
        counts = self._state.rows.counts("origin")
        with self._state.lock:
            known = list(self._state.origins.items())
        return [
            OriginStats(origin, counts.get(of.ref, 0), of.audits, of.wrong, of.quarantined, of.dropped)
            for origin, of in known
        ]

    def stats(self) -> MemoryStats:
        counts = self._state.rows.counts("space")
        with self._state.lock:
            partitions = list(self._state.partitions.items())
            pending, entries = len(self._state.pending), len(self._state.rows)
        return MemoryStats(
            entries=entries,
            spaces=[
                SpaceStats(space, width, counts.get(part.ref, 0), len(part.segments), len(part.tail))
                for (space, width), part in partitions
            ],
            origins=len(self._state.origins),
            quarantined=sum(origin.quarantined for origin in list(self._state.origins.values())),
            pending=pending,
            disk_bytes=disk_bytes(self.folder),
            max_bytes=self._max_bytes,
            age_s=self._clock.now(),
            write_errors=self._writer.errors,
            counts=self._state.counts,
        )

    def export(self, path: Path) -> int:
        """Writes all entries as they were signed; returns how many. Raises StoreError if `path` can't be written."""
        self.flush()
        return portable.export(self.folder / DATABASE, path)

    def import_(self, path: Path, accept: Callable[[Entry], bool] = lambda entry: True) -> portable.Imported:
        """Adds what `export` wrote; bad lines, and entries that are not accepted, are counted and change nothing."""
        return portable.import_(path, self.add, accept)

    def clear(self, *, space: bytes | None = None, origin: bytes | None = None) -> int:
        """Forgets the entries of a space, of an origin with its record, or all; returns how many. Nothing of them is
        left on the disk."""
        gone = self._judgement.clear(space, origin)
        self._bounds.compact_next = True
        self.flush()
        self.settle(_SETTLE_S)
        self.flush()
        return gone

    # What its threads call

    def _look(self) -> None:
        self._merges.look()

    def _look_at_tail(self, entry: Entry) -> None:
        partition = self._state.partitions.get((entry.space, len(entry.key)))
        if partition is not None and len(partition.tail) >= self._tail_limit:
            self._merges.look()

    def _save_state(self, store: Store) -> None:
        store.save_state(self._state.rows.serial - 1, self._clock.now(), self._clock.wall())

    def _suspect(self, error: sqlite3.Error, readers: Readers) -> None:
        """Reading failed. If the file is damaged, the writer finds out in its own time, unless it has already."""
        self._state.counts.read_errors += 1

        def fail(store: Store) -> None:
            if self._lookup.readers is readers:
                raise error

        if damaged(error):
            self._writer.put(Change(fail))

    def _replace(self, store: Store) -> tuple[Store, list[Change]]:
        self._lookup.readers.close()
        fresh, pending, outdated = start_over(store, self._state, self._writer.discard)
        self._lookup.readers = Readers(fresh.path)
        for entry in pending:
            self._admission.learn(entry)
        return fresh, outdated
