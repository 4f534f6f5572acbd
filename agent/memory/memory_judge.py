"""What becomes of entries and origins when they prove right or wrong: at once in RAM, then in the writer's queue."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from agent.memory.memory_rows import Ids
from agent.memory.memory_state import MemoryClock, State
from agent.memory.memory_writer import Change, Writer
from agent.memory.store import Origin, Store

_CONFIRMED = 0.25  # of the distrust that a confirmation takes away
_BLAMED = 0.5  # of the trust that is left after an error
_FLOOR = 0.2  # trust below which an entry goes: three errors in a row, from full trust


class Judgement:
    """Thread-safe; nothing but `clear` waits for the disk. Ids of entries that are gone mean nothing."""

    def __init__(self, state: State, writer: Writer, clock: MemoryClock) -> None:
        self._state = state
        self._writer = writer
        self._clock = clock

    def used(self, ids: Iterable[int]) -> None:
        found, seconds = list(ids), int(self._clock.now())
        self._put(Change(lambda store: store.hit(found, seconds)))

    def confirm(self, ids: Iterable[int]) -> None:
        seconds = int(self._clock.now())
        with self._state.lock:
            trusts: dict[int, float] = {}
            for id in ids:
                if (slot := self._state.rows.slot(id)) is not None:
                    trust = self._state.rows.columns["trust"]
                    trust[slot] += _CONFIRMED * (1 - trust[slot])
                    trusts[id] = float(trust[slot])
            self._state.counts.confirmed += len(trusts)
            self._put(Change(lambda store: store.confirm(trusts, seconds)))

    def blame(self, ids: Iterable[int]) -> int:
        """How many lost so much trust that they went."""
        rows, seconds = self._state.rows, int(self._clock.now())
        trusts: dict[int, float] = {}
        fallen: dict[int, int] = {}  # id: identity
        with self._state.lock:
            for id in ids:
                if (slot := rows.slot(id)) is not None:
                    rows.columns["trust"][slot] *= _BLAMED
                    trusts[id] = float(rows.columns["trust"][slot])
                    if trusts[id] < _FLOOR:
                        fallen[id] = int(rows.columns["identity"][slot])
            self._state.refused.update(fallen.values())
        gone = self._state.drop(np.array(list(fallen), np.int64))
        self._state.counts.blamed += len(gone)

        def write(store: Store) -> None:
            store.distrust(trusts)
            store.delete(fallen)
            store.refuse(fallen.values(), seconds)

        self._writer.put(Change(write, lambda: self._state.release(gone)))
        return len(gone)

    def note_audit(self, origin: bytes, wrong: bool, keep: float) -> None:
        with self._state.lock:
            record = self._state.origin(origin)
            record.audits = record.audits * keep + 1
            record.wrong = record.wrong * keep + wrong
            self._put(self._saving(origin, record))

    def quarantine(self, origin: bytes) -> None:
        """Nothing of it is found from now on; its entries go when the writer comes to it."""
        state = self._state
        with state.lock:
            record = state.origin(origin)
            record.quarantined = True
            state.quarantined.add(record.ref)
            self._writer.put(
                Change(
                    lambda store: store.quarantine(origin, record),
                    lambda: state.release(state.drop(state.rows.where("origin", record.ref))),
                )
            )

    def _put(self, change: Change) -> None:
        """What holds in RAM and may be lost with it, if the disk refuses for long."""
        if not self._writer.full:
            self._writer.put(change)

    def _saving(self, origin: bytes, record: Origin) -> Change:
        return Change(lambda store: store.save_origin(origin, record))

    def clear(self, space: bytes | None, origin: bytes | None) -> int:
        """Entries of a space, of an origin with its record, or all. Waits; raises StoreError."""
        state = self._state
        with state.lock:
            ids = self._chosen(space, origin)
            record = state.origins.get(origin) if origin is not None else None
            if origin is not None and record is not None:
                record.audits = record.wrong = record.dropped = 0
                record.quarantined = False
                state.quarantined.discard(record.ref)
                self._writer.put(self._saving(origin, record))
            everything = space is None and origin is None
            if everything:
                state.refused.clear()
        gone = state.drop(ids)

        def write(store: Store) -> None:
            store.delete(gone.tolist())
            if everything:
                store.forget_refused()

        self._writer.wait(self._writer.submit(Change(write, lambda: state.release(gone))))
        return len(gone)

    def _chosen(self, space: bytes | None, origin: bytes | None) -> Ids:
        state = self._state
        chosen: list[Ids] = []
        if origin is not None:
            known = state.origins.get(origin)
            chosen = [state.rows.where("origin", known.ref)] if known else []
        elif space is not None:
            refs = [partition.ref for (name, _), partition in state.partitions.items() if name == space]
            chosen = [state.rows.where("space", ref) for ref in refs]
        else:
            chosen = [state.rows.ids()]
        return np.concatenate([np.empty(0, np.int64), *chosen])
