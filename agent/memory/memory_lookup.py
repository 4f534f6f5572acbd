"""Finding neighbours: candidates from the index, decided on their keys. Nothing here waits for a writer or a merge."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agent.memory.base import Key, Neighbour
from agent.memory.index import as_keys, near
from agent.memory.memory_rows import SLOT, Ids, shared_tail, slots_of, tail_code
from agent.memory.memory_state import State
from agent.memory.store_reader import Readers
from protocol.memory import Entry

Keys = NDArray[np.int8]  # (n, width)


class Lookup:
    """Thread-safe. `failed` is told when the database can't be read; then what is in RAM still answers."""

    def __init__(self, state: State, readers: Readers, failed: Callable[[sqlite3.Error, Readers], None]) -> None:
        self._state = state
        self.readers = readers
        self._failed = failed

    def neighbours(self, space: bytes, key: Key, tail: bytes, k: int) -> list[Neighbour]:
        with self._state.lock:
            partition = self._state.partitions.get((space, len(key)))
            if partition is None or k < 1 or not key.any():
                return []
            rows = self._state.rows
            segments, recent = partition.view()
        code = tail_code(tail)
        candidates = near(segments, key, code, k)
        ids, keys = self._stored(candidates[rows.alive(candidates)], len(key))
        best = recent.best(key.astype(np.float32), code, rows, k)
        ids, keys = np.concatenate([ids, recent.ids[best]]), np.concatenate([keys, recent.keys[best]])
        query, compared = key.astype(np.float64), keys.astype(np.float64)
        squares = np.einsum("nw,nw->n", compared, compared) * np.einsum("w,w->", query, query)
        similarity = np.einsum("nw,w->n", compared, query) / np.sqrt(squares)
        order = np.lexsort((ids, -similarity))
        return self._described(ids[order], keys[order], similarity[order], code, k)

    def _stored(self, ids: Ids, width: int) -> tuple[Ids, Keys]:
        """Those whose keys can be read."""
        found: dict[int, bytes] = {}
        if len(ids):
            readers = self.readers
            try:
                found = dict(readers.keys(slots_of(ids).tolist()))
            except sqlite3.Error as error:
                self._failed(error, readers)
        there = [id for id in ids.tolist() if len(found.get(id & SLOT, b"")) == width]
        return np.array(there, np.int64), as_keys([found[id & SLOT] for id in there], width)

    def _described(self, ids: Ids, keys: Keys, similarity: NDArray[np.float64], code: int, k: int) -> list[Neighbour]:
        """The first k that are there at the end of the search: a slot that was taken anew meanwhile has another id."""
        with self._state.lock:
            rows, names = self._state.rows, self._state.names
            there = rows.alive(ids)
            if self._state.quarantined:
                there &= np.isin(rows.of("origin", ids), list(self._state.quarantined), invert=True)
            chosen = np.flatnonzero(there)[:k]
            ids = ids[chosen]
            fields = [rows.of(name, ids).tolist() for name in ("id", "token", "p", "count", "trust")]
            senders = [names[ref] for ref in rows.of("origin", ids).tolist()]
            tails = shared_tail(rows.of("tail", ids), code).tolist()
        return [
            Neighbour(id, similar, tail, token, p, count, trust, origin, key)
            for id, token, p, count, trust, similar, tail, origin, key in zip(
                *fields, similarity[chosen].tolist(), tails, senders, keys[chosen], strict=True
            )
        ]

    def entries(self, ids: Sequence[int]) -> list[Entry]:
        """As their origins signed them, those that are still there."""
        with self._state.lock:
            ids = [id for id in ids if self._state.rows.slot(id) is not None]
            found = {id: self._state.pending[id] for id in ids if id in self._state.pending}
        readers = self.readers
        try:
            found |= readers.entries([id for id in ids if id not in found])
        except sqlite3.Error as error:
            self._failed(error, readers)
        return [found[id] for id in ids if id in found]
