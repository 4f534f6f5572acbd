"""Which entries are known: a hash table from identities to slots, a tenth of the size of a dict."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_EMPTY = -1
_FULL = 0.6  # share of cells in use at which the table grows


class Known:
    """Open addressing with linear probing (Knuth, "The Art of Computer Programming", volume 3, 6.4). Identities are
    hashes, so their low bits say where to look. A cell holds a slot; whose identity that is stands in the slot itself,
    so a cell whose slot is empty or was taken anew is simply passed over."""

    def __init__(self) -> None:
        self._cells = np.full(4096, _EMPTY, np.int32)
        self._used = 0

    def rebuild(self, identities: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """(n,) each: all that are known."""
        size = len(self._cells)
        while size * _FULL < 2 * len(slots):
            size *= 2
        self._cells = np.full(size, _EMPTY, np.int32)
        self._used = len(slots)
        places = identities & (size - 1)
        while len(slots):
            free = self._cells[places] == _EMPTY
            self._cells[places[free]] = slots[free]  # of several that want one cell, one gets it
            left = self._cells[places] != slots
            slots, places = slots[left], (places[left] + 1) & (size - 1)

    def find(self, identity: int, identities: NDArray[np.int64], ids: NDArray[np.int64]) -> int | None:
        """The slot of an entry, by the columns that slots stand for."""
        mask = len(self._cells) - 1
        place = identity & mask
        while (slot := self._cells.item(place)) != _EMPTY:
            if identities.item(slot) == identity and ids.item(slot):
                return slot
            place = (place + 1) & mask
        return None

    def add(self, identity: int, slot: int) -> bool:
        """False if the table is full: then it must be rebuilt."""
        if self._used >= _FULL * len(self._cells):
            return False
        mask = len(self._cells) - 1
        place = identity & mask
        while self._cells.item(place) != _EMPTY:
            place = (place + 1) & mask
        self._cells[place] = slot
        self._used += 1
        return True
