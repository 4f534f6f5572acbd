"""What the memory knows of each entry besides its key, in RAM: a slot map.

An entry's id is the number of its birth and the slot that it lies in. Slots are used again, so that the file stays
dense without being rewritten; births are not, so that an id of an entry that is gone never means another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.memory.memory_known import Known

SLOT_BITS = 24
SLOT = (1 << SLOT_BITS) - 1
Ids = NDArray[np.int64]  # (n,)
Codes = NDArray[np.uint64]  # (n,)

_TYPES = {
    "id": np.int64,
    "identity": np.int64,
    "tail": np.uint64,
    "p": np.float64,
    "trust": np.float64,
    "token": np.int32,
    "count": np.int32,
    "origin": np.int32,
    "space": np.int32,
}
FIELDS = tuple(_TYPES)
"""Of a row; columns of the table `entries` have the same names."""

_DIFFERING = np.array([1, 1 << 16, 1 << 32, 1 << 48], np.uint64)  # below these, more and more hashes are equal
_SHARED = np.array([8, 4, 2, 1, 0])

Columns = dict[str, NDArray[Any]]  # each (n,)


def slots_of(ids: Ids) -> Ids:
    return ids & SLOT


def tail_code(tail: bytes) -> int:
    """The four hashes as one number, that of the last token highest: equal high bits mean equal last tokens."""
    last = int.from_bytes(tail, "little")
    return (last & 0xFFFF) << 48 | (last >> 16 & 0xFFFF) << 32 | (last >> 32 & 0xFFFF) << 16 | last >> 48


def tail_bytes(code: int) -> bytes:
    """What `tail_code` was made of."""
    return b"".join((code >> shift & 0xFFFF).to_bytes(2, "little") for shift in (48, 32, 16, 0))


def shared_tail(codes: Codes, code: int) -> NDArray[np.int64]:
    """(n,) how many of the last tokens are the same: 0, 1, 2, 4 or 8."""
    shared: NDArray[np.int64] = _SHARED[np.searchsorted(_DIFFERING, codes ^ np.uint64(code), "right")]
    return shared


class Rows:
    """Not thread-safe: whoever changes it holds the memory's lock. Columns may be read without."""

    def __init__(self) -> None:
        self.columns: Columns = {name: np.zeros(1024, kind) for name, kind in _TYPES.items()}  # by slot
        self.serial = 1
        self._known = Known()
        self._size = 0
        self._top = 0
        self._free: list[int] = []

    def __len__(self) -> int:
        return self._size

    def load(self, found: Columns, serial: int) -> None:
        """`found`: all rows, as `read` gives them."""
        slots = slots_of(found["id"])
        self._top = int(slots.max()) + 1 if slots.size else 0
        self._reserve(self._top)
        for name, values in found.items():
            self.columns[name][slots] = values
        self._free = np.flatnonzero(self.columns["id"][: self._top] == 0)[::-1].tolist()
        self._known.rebuild(found["identity"], slots)
        self._size = len(slots)
        self.serial = serial

    @staticmethod
    def read(rows: Iterable[tuple[Any, ...]]) -> Columns:
        """Of tuples in the order of FIELDS."""
        signed = {**_TYPES, "tail": np.int64}
        found = np.fromiter(rows, np.dtype(list(signed.items())))
        return {
            name: found[name].astype(np.int64).view(np.uint64) if name == "tail" else found[name] for name in FIELDS
        }

    def take(self, identity: int, code: int, p: float, token: int, count: int, origin: int, space: int) -> int:
        """The id of a new entry, which is trusted in full."""
        slot = self._free.pop() if self._free else self._top
        if slot == self._top:
            self._top += 1
            self._reserve(self._top)
        id = self.serial << SLOT_BITS | slot
        self.serial += 1
        values = (id, identity, code, p, 1.0, token, count, origin, space)
        for column, value in zip(self.columns.values(), values, strict=True):
            column[slot] = value
        self._size += 1
        if not self._known.add(identity, slot):
            columns, living = self._living()
            self._known.rebuild(columns["identity"][living], living)
        return id

    def find(self, identity: int) -> int | None:
        """The id of the entry with this identity."""
        slot = self._known.find(identity, self.columns["identity"], self.columns["id"])
        return None if slot is None else self.columns["id"].item(slot)

    def _reserve(self, size: int) -> None:
        if size > len(self.columns["id"]):
            grown = max(size, len(self.columns["id"]) * 5 // 4)
            self.columns = {
                name: np.concatenate([column, np.zeros(grown - len(column), column.dtype)])
                for name, column in self.columns.items()
            }

    def of(self, field: str, ids: Ids) -> NDArray[Any]:
        """(n,) what stands in the slots of these entries, whoever has them now."""
        values: NDArray[Any] = self.columns[field].take(slots_of(ids), mode="clip")
        return values

    def alive(self, ids: Ids) -> NDArray[np.bool_]:
        alive: NDArray[np.bool_] = self.of("id", ids) == ids  # the slot is part of the id: a clipped one is unequal
        return alive

    def slot(self, id: int) -> int | None:
        """Where the entry lies in the columns, None if it is gone."""
        slot, ids = id & SLOT, self.columns["id"]
        return slot if slot < len(ids) and ids[slot] == id else None

    def where(self, field: str, value: int) -> Ids:
        """Ids of all entries whose `field` is `value`."""
        columns, living = self._living()
        ids: Ids = columns["id"][living[columns[field][living] == value]]
        return ids

    def ids(self) -> Ids:
        """Of all entries."""
        columns, living = self._living()
        ids: Ids = columns["id"][living]
        return ids

    def counts(self, field: str) -> dict[int, int]:
        """How many entries have each value of `field`."""
        columns, living = self._living()
        counts = np.bincount(columns[field][living]).tolist()
        return {value: count for value, count in enumerate(counts) if count}

    def _living(self) -> tuple[Columns, NDArray[np.intp]]:
        """The columns, and the slots in use: of one moment, since others may write meanwhile."""
        columns = self.columns
        return columns, np.flatnonzero(columns["id"][: self._top] != 0)

    def drop(self, ids: Ids) -> Ids:
        """From now on they are not there; returns those that were. Their slots stay theirs until `release`."""
        ids = ids[self.alive(ids)]
        self.columns["id"][slots_of(ids)] = 0
        self._size -= len(ids)
        return ids

    def release(self, ids: Ids) -> None:
        """Their slots may be used again: nothing on disk has them any more."""
        self._free.extend(slots_of(ids).tolist())
