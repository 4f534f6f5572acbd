"""The index over one space's keys: segments for the bulk, an exact numpy tail for what is in none of them yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.memory.base import Key
from agent.memory.memory_rows import Ids, Rows, shared_tail
from agent.memory.segments import Segment

_CANDIDATES = 12  # of the segments, whose keys are compared exactly, besides two for each neighbour that is wanted
_SAME_TAIL = 16  # candidates for their last tokens' sake, at most
_GROWTH = 4  # a segment is merged with smaller ones until those are a quarter of its size
_DEAD = 0.3  # share of entries that are gone at which a segment is built anew


class Tail:
    """Keys in RAM, scanned. Rows are only ever appended: who holds a `view` of it sees what was there then."""

    def __init__(self, width: int) -> None:
        self._size = 0
        self._ids = np.zeros(16, np.int64)
        self._keys = np.zeros((16, width), np.int8)
        self._scales = np.zeros(16, np.float32)

    def __len__(self) -> int:
        return self._size

    def append(self, ids: Sequence[int] | Ids, keys: NDArray[np.int8]) -> None:
        """`keys` (n, width)."""
        end = self._size + len(keys)
        if end > len(self._ids):
            room = max(end, 2 * len(self._ids))
            self._ids = np.resize(self._ids, room)
            self._keys = np.concatenate([self._keys, np.zeros((room - len(self._keys), self._keys.shape[1]), np.int8)])
            self._scales = np.resize(self._scales, room)
        self._ids[self._size : end] = ids
        self._keys[self._size : end] = keys
        self._scales[self._size : end] = 1 / np.sqrt(np.einsum("nw,nw->n", keys, keys, dtype=np.float64))
        self._size = end

    def view(self) -> TailView:
        return TailView(self._ids[: self._size], self._keys[: self._size], self._scales[: self._size])


@dataclass(frozen=True, slots=True)
class TailView:
    ids: Ids  # (n,)
    keys: NDArray[np.int8]  # (n, width)
    scales: NDArray[np.float32]  # (n,) one over each key's length

    def best(self, query: NDArray[np.float32], code: int, rows: Rows, count: int) -> NDArray[np.intp]:
        """Rows of the `count` most similar living entries, and of the newest ones with the same last tokens."""
        if not len(self.ids):
            return np.empty(0, np.intp)
        cosines = np.empty(len(self.ids), np.float32)
        for start in range(0, len(self.ids), 256):  # in pieces that stay in the cache
            part = slice(start, start + 256)
            np.einsum("nw,w->n", self.keys[part].astype(np.float32), query, out=cosines[part])
        cosines *= self.scales
        cosines[~rows.alive(self.ids)] = -np.inf
        most = np.argpartition(-cosines, count)[:count] if count < len(cosines) else np.arange(len(cosines))
        same = shared_tail(rows.of("tail", self.ids), code)
        close = np.flatnonzero(same >= 2)
        close = close[np.lexsort((-self.ids[close], -same[close]))[:_SAME_TAIL]]
        return np.union1d(most, close)


def as_keys(found: Iterable[bytes], width: int) -> NDArray[np.int8]:
    """(n, width) of as many bytes each."""
    return np.frombuffer(b"".join(found), np.int8).reshape(-1, width)


class Partition:
    """One space's index. Searches work on a `view`."""

    def __init__(self, ref: int, width: int) -> None:
        self.ref = ref
        self.width = width
        self.segments: tuple[Segment, ...] = ()
        self.tail = Tail(width)

    def view(self) -> tuple[tuple[Segment, ...], TailView]:
        """Needs the memory's lock: an entry is in one of both."""
        return self.segments, self.tail.view()

    def install(self, segment: Segment | None, replaced: Sequence[Segment], lock: threading.Lock) -> None:
        """A segment takes the place of others, and of what it holds of the tail. One thread may do this; the lock is
        held for a moment at the end."""
        seen = self.tail.view()
        kept = np.isin(seen.ids, segment.ids if segment is not None else (), invert=True)
        tail = Tail(self.width)
        tail.append(seen.ids[kept], seen.keys[kept])
        segments = [old for old in self.segments if old not in replaced]
        segments += [segment] if segment is not None else []
        with lock:
            now = self.tail.view()
            tail.append(now.ids[len(seen.ids) :], now.keys[len(seen.ids) :])
            self.segments, self.tail = tuple(segments), tail


def near(segments: Sequence[Segment], key: Key, code: int, k: int) -> Ids:
    """Candidates from the segments for k neighbours; some may be gone."""
    if not segments:
        return np.empty(0, np.int64)
    query = key.astype(np.float32)
    count = _CANDIDATES + 2 * k
    total = sum(len(segment.ids) for segment in segments)
    found: list[Ids] = []
    distances: list[float] = []
    for segment in segments:
        items, far = segment.near(query, count, len(segment.ids) / total)
        found.append(segment.ids[items])
        distances += far
    ids = np.concatenate(found)
    if len(segments) > 1:
        ids = ids[np.argsort(distances)[:count]]
    same = [segment.same_tail(code, max(4, _SAME_TAIL // len(segments))) for segment in segments]
    return np.unique(np.concatenate([ids, *same]))


@dataclass(frozen=True, slots=True)
class Merge:
    """What is to become one segment, or none if nothing of it is left."""

    partition: Partition
    segments: tuple[Segment, ...]
    ids: Ids


def plan(partition: Partition, rows: Rows, tail_limit: int, lock: threading.Lock) -> Merge | None:
    """What to merge next. Sizes fall by more than `_GROWTH` from segment to segment, so there are few, and each entry
    is written few times."""
    with lock:  # so that what it holds has also been queued for the writer
        segments, recent = partition.view()
    tail = recent.ids[rows.alive(recent.ids)]
    living = {segment: segment.ids[rows.alive(segment.ids)] for segment in segments}
    holed = [segment for segment, ids in living.items() if len(ids) < (1 - _DEAD) * len(segment.ids)]
    if len(tail) < tail_limit and not holed:
        return None
    parts, merged = [tail], []
    for segment in sorted(living, key=lambda segment: len(living[segment])):
        ids = living[segment]
        if segment in holed or len(ids) <= _GROWTH * sum(map(len, parts)):
            parts.append(ids)
            merged.append(segment)
    return Merge(partition, tuple(merged), np.concatenate(parts))
