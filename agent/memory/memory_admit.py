"""What comes into the memory: at once into RAM, then into the writer's queue.

Changes are queued under the memory's lock, so that they are written in the order in which they took hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from agent.memory.index import as_keys
from agent.memory.memory_rows import SLOT, tail_code
from agent.memory.memory_state import MemoryClock, State
from agent.memory.memory_writer import Change, Writer
from agent.memory.store import Store, identity_of
from protocol.errors import ProtocolError, StoreError
from protocol.memory import SIGNATURE_BYTES, Entry, value_flaw


def check(entry: Entry) -> None:
    """Raises ProtocolError unless the entry is well-formed. Whether its origin signed it is not looked at."""
    flaw = value_flaw(entry)
    if flaw is None and len(entry.signature) not in (0, SIGNATURE_BYTES):
        flaw = "malformed"
    if flaw is not None:
        raise ProtocolError(f"a memory entry has {flaw} fields")


class Admission:
    """Thread-safe."""

    def __init__(self, state: State, writer: Writer, clock: MemoryClock) -> None:
        self._state = state
        self._writer = writer
        self._clock = clock

    def learn(self, entry: Entry) -> None:
        """Never waits for the disk. If that has refused so much already that the backlog is full, the entry is lost."""
        identity = identity_of(entry)
        with self._state.lock:
            if self._writer.full:
                self._state.counts.lost += 1
                return
            change = self._admit(entry, identity)
            if change is not None:
                self._writer.put(change)

    def add(self, entries: Sequence[Entry]) -> int:
        """One transaction, durable when this returns: how many were new. Raises StoreError, and nothing is changed."""
        identities = [identity_of(entry) for entry in entries]
        rows, pending = self._state.rows, self._state.pending
        with self._state.lock:
            before = rows.serial
            underway = [id for identity in identities if (id := rows.find(identity)) in pending]
            admitted = [self._admit(entry, identity) for entry, identity in zip(entries, identities, strict=True)]
            changes = [change for change in admitted if change is not None]
            new = rows.serial - before
            if not changes and not underway:
                return 0
            waiter = self._writer.submit(_together(changes))
        self._writer.wait(waiter)
        if not rows.alive(np.array(underway, np.int64)).all():
            raise StoreError("an entry that was being written by somebody else could not be")
        return new

    def _admit(self, entry: Entry, identity: int) -> Change | None:
        """Needs the lock. What has to be written, None if nothing is new."""
        state = self._state
        origin = state.origins.get(entry.origin)
        if identity in state.refused or (origin is not None and origin.quarantined):
            state.counts.refused += 1
            return None
        known = state.rows.find(identity)
        if known is None:
            return self._new(entry, identity)
        if entry.count > state.rows.columns["count"][known & SLOT]:
            return self._renewed(known, entry)
        state.counts.known += 1
        return None

    def _new(self, entry: Entry, identity: int) -> Change:
        state, seconds = self._state, int(self._clock.now())
        partition = state.partition(entry.space, len(entry.key))
        space, origin = partition.ref, state.origin(entry.origin).ref
        code = tail_code(entry.tail)
        id = state.rows.take(identity, code, entry.p, entry.token, entry.count, origin, space)
        partition.tail.append([id], as_keys([entry.key], partition.width))
        state.pending[id] = entry
        state.counts.learned += 1

        def withdraw() -> None:
            state.release(state.drop(np.array([id], np.int64)))

        return Change(
            lambda store: store.insert(id, identity, code, entry, space, origin, seconds),
            self._durable(id, entry),
            withdraw,
        )

    def _renewed(self, id: int, entry: Entry) -> Change:
        """Its origin reports it with a higher count."""
        state, seconds = self._state, int(self._clock.now())
        columns, slot = state.rows.columns, id & SLOT
        old = [(field, columns[field][slot].item()) for field in ("p", "count")]
        columns["p"][slot], columns["count"][slot] = entry.p, entry.count
        state.pending[id] = entry

        def restore() -> None:
            durable()
            with state.lock:
                columns = state.rows.columns
                if state.rows.slot(id) is not None and columns["count"][slot] == entry.count:
                    for field, value in old:
                        columns[field][slot] = value

        durable = self._durable(id, entry)
        return Change(lambda store: store.renew(id, entry, seconds), durable, restore)

    def _durable(self, id: int, entry: Entry) -> Callable[[], None]:
        state = self._state

        def durable() -> None:
            with state.lock:
                if state.pending.get(id) is entry:
                    del state.pending[id]

        return durable


def _together(changes: Sequence[Change]) -> Change:
    """As one change, of which all or nothing is written."""

    def write(store: Store) -> None:
        for change in changes:
            change.write(store)

    def after() -> None:
        for change in changes:
            change.after()

    def undo() -> None:
        for change in reversed(changes):
            change.undo()

    return Change(write, after, undo)
