"""What the memory holds in RAM, and how it comes there from disk."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from agent.memory.index import Partition, as_keys
from agent.memory.memory_rows import SLOT, Ids, Rows
from agent.memory.segments import BadSegment, Segment, segment_path
from agent.memory.store import Origin, SegmentRow, Store, Write
from protocol.memory import Entry

_log = logging.getLogger(__name__)

_LONGEST_ABSENCE = 86_400.0  # seconds that a restart may add, whatever the wall clock says
_CHUNK = 4096  # keys read at once
_DROPPED = 512  # entries dropped at once


class MemoryClock:
    """Seconds that the memory has lived through: running time, and at most a day for each time it was closed.

    A wall clock that jumps must not make anything old. `clock`: monotonic, `wall`: Unix time, both in seconds.
    """

    def __init__(
        self, clock: Callable[[], float], wall: Callable[[], float], seconds: float = 0.0, left: float | None = None
    ) -> None:
        """`seconds` at the wall clock's time `left`, when it was closed."""
        self._clock = clock
        self.wall = wall
        absent = 0.0 if left is None else min(max(0.0, wall() - left), _LONGEST_ABSENCE)
        self._offset = seconds + absent - clock()

    def now(self) -> float:
        return self._offset + self._clock()


@dataclass(slots=True)
class Counts:
    """Since the memory was opened."""

    learned: int = 0
    known: int = 0  # came again
    refused: int = 0  # their origin is quarantined, or they proved wrong before
    confirmed: int = 0
    blamed: int = 0  # proved wrong so often that they went
    aged: int = 0
    evicted: int = 0
    lost: int = 0  # not kept, because the disk refuses and RAM is for other things
    damaged_files: int = 0  # databases set aside
    damaged_segments: int = 0  # segments that were missing or not what was built
    merges: int = 0
    merge_errors: int = 0
    read_errors: int = 0


@dataclass(slots=True)
class State:
    """`lock` guards all of it, for microseconds at a time. `pending`: entries by id that are not durable yet."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: Rows = field(default_factory=Rows)
    partitions: dict[tuple[bytes, int], Partition] = field(default_factory=dict)
    origins: dict[bytes, Origin] = field(default_factory=dict)
    names: dict[int, bytes] = field(default_factory=dict)  # of origins by ref, in ascending order
    quarantined: set[int] = field(default_factory=set)  # refs of origins
    refused: set[int] = field(default_factory=set)
    pending: dict[int, Entry] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    next_segment: int = 1

    def partition(self, space: bytes, width: int) -> Partition:
        found = self.partitions.get((space, width))
        if found is None:
            ref = 1 + max((other.ref for other in self.partitions.values()), default=0)
            found = self.partitions[space, width] = Partition(ref, width)
        return found

    def origin(self, origin: bytes) -> Origin:
        found = self.origins.get(origin)
        if found is None:
            ref = 1 + next(reversed(self.names), 0)
            found = self.origins[origin] = Origin(ref)
            self.names[ref] = origin
        return found

    def drop(self, ids: Ids) -> Ids:
        """They are found no more; returns those that were there, whose slots are not free before `release`."""
        gone = []
        for start in range(0, len(ids), _DROPPED):  # nobody waits for the lock for long
            with self.lock:
                gone.append(self.rows.drop(ids[start : start + _DROPPED]))
                for id in gone[-1].tolist():
                    self.pending.pop(id, None)
        return np.concatenate(gone) if gone else ids

    def release(self, ids: Ids) -> None:
        """Nothing that is durable has them any more."""
        with self.lock:
            self.rows.release(ids)

    def load(self, store: Store, folder: Path) -> list[Write]:
        """Everything that is durable; returns what must be written, since part of it is of no use."""
        serial = store.state()[0]
        self.rows.load(Rows.read(store.rows()), max(serial + 1, self.rows.serial))
        self.origins = store.origins()
        idle = self._drop_idle_origins()
        self.names = {known.ref: origin for origin, known in self.origins.items()}
        self.quarantined = {known.ref for known in self.origins.values() if known.quarantined}
        self.refused = store.refused()
        self.partitions = {(space, width): Partition(ref, width) for ref, space, width in store.spaces()}
        bad = self._load_segments(store.segments(), folder)
        broken = self._load_tails(store)
        return [
            lambda store: store.delete_origins(idle),
            lambda store: store.put_segment(None, bad),
            lambda store: store.delete(broken),
        ]

    def _drop_idle_origins(self) -> list[int]:
        """Refs of those of which nothing is known any more."""
        used = self.rows.counts("origin")
        idle = {origin: known.ref for origin, known in self.origins.items() if known.ref not in used}
        idle = {origin: ref for origin, ref in idle.items() if self.origins[origin].unknown}
        for origin in idle:
            del self.origins[origin]
        return list(idle.values())

    def _load_segments(self, rows: list[SegmentRow], folder: Path) -> list[int]:
        partitions = {partition.ref: partition for partition in self.partitions.values()}
        bad = []
        for row in rows:
            self.next_segment = row.ref + 1
            try:
                partition = partitions[row.space]
                segment = Segment(folder, row, partition.width)
            except (BadSegment, KeyError, ValueError) as error:
                self.counts.damaged_segments += 1
                _log.warning("a part of the memory's index is built anew: %s", error)
                bad.append(row.ref)
                continue
            segment.know_tails(self.rows.of("tail", segment.ids))
            partition.segments = (*partition.segments, segment)
        self._remove_strays({row.ref for row in rows} - set(bad), folder)
        return bad

    def _remove_strays(self, wanted: set[int], folder: Path) -> None:
        names = {segment_path(folder, ref).name for ref in wanted}
        for path in folder.glob("segment-*"):
            if path.name not in names:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _load_tails(self, store: Store) -> list[int]:
        """Returns ids of entries without a proper key, which only a damaged file has."""
        broken: list[int] = []
        for partition in self.partitions.values():
            ids = self.rows.where("space", partition.ref)
            covered = np.concatenate([np.empty(0, np.int64), *(segment.ids for segment in partition.segments)])
            ids = np.sort(ids[np.isin(ids, covered, invert=True)])  # by age
            for start in range(0, len(ids), _CHUNK):
                part = ids[start : start + _CHUNK].tolist()
                found = dict(store.keys(id & SLOT for id in part))
                keys = {id: key for id in part if len(key := found.get(id & SLOT, b"")) == partition.width}
                partition.tail.append(list(keys), as_keys(keys.values(), partition.width))
                broken += set(part) - keys.keys()
        self.rows.release(self.rows.drop(np.array(broken, np.int64)))
        return broken
