"""Segments of the index: annoy forests over projected keys, immutable, memory-mapped, checked before they are mapped.

Each segment projects onto the principal axes of its own keys. Hidden states vary along few directions (an effective
dimension of about 20 in 576), so 48 axes keep what tells them apart: of the 16 nearest of 22,000 keys from news text,
48 candidates hold 95 % by principal axes and 80 % by 48 random ones where the nearest has a cosine of 0.8 to 0.9. The
candidates' order is decided on the keys themselves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from annoy import AnnoyIndex
from numpy.typing import NDArray

from agent.memory.memory_rows import Codes, Ids, shared_tail
from agent.memory.store import SegmentRow

AXES = 48
TREES = 12
RECIPE = f"annoy 1.17, {AXES} principal axes, {TREES} trees"
"""Names all that a segment's content depends on besides its keys and axes."""

_NODES = 1000  # that a search of a whole index looks at; each segment gets its share
_FEWEST = 400  # nodes that a search looks at in a small segment
_SAME_TAIL = 8192  # entries with a similar tail whose age is looked at, to either side
_ID_BITS = 59  # that an id has at most

Vectors = NDArray[np.float32]


class BadSegment(Exception):
    """The file is missing, or not what was built."""


def segment_path(folder: Path, ref: int) -> Path:
    return folder / f"segment-{ref}.annoy"


class Segment:
    """Raises BadSegment unless the file is byte for byte what was built: annoy trusts what it maps, and crashes."""

    def __init__(self, folder: Path, row: SegmentRow, width: int) -> None:
        self.row = row
        self._axes: Vectors = np.frombuffer(row.axes, np.float32).reshape(AXES, width)
        self.ids: Ids = np.frombuffer(row.ids, np.int64)
        self._codes: Codes = np.empty(0, np.uint64)
        path = segment_path(folder, row.ref)
        if row.recipe != RECIPE:
            raise BadSegment(f"{path.name} was built in another way")
        try:
            if path.stat().st_size != row.size:
                raise BadSegment(f"{path.name} has {path.stat().st_size} bytes instead of {row.size}")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != row.sha256:
                    raise BadSegment(f"{path.name} has another content than was built")
            self._forest = AnnoyIndex(AXES, "angular")
            self._forest.load(str(path))
        except OSError as error:
            raise BadSegment(f"{path.name}: {error.strerror or error}") from None
        if self._forest.get_n_items() != len(self.ids):
            raise BadSegment(f"{path.name} holds another number of entries")

    def know_tails(self, codes: Codes) -> None:
        """(n,) of its entries. Sorted by tail, then by age, so that equal last tokens are neighbours."""
        order = np.lexsort((self.ids, codes))
        self._codes, self._by_tail = codes[order], self.ids[order]

    def near(self, query: Vectors, count: int, share: float) -> tuple[list[int], list[float]]:
        """Items whose projections are near, and their distances. `query` (width,); `share`: of all entries that lie in
        this segment."""
        vector = np.einsum("aw,w->a", self._axes, query).tolist()
        nodes = max(int(_NODES * share), _FEWEST)
        return self._forest.get_nns_by_vector(vector, count, nodes, include_distances=True)

    def same_tail(self, code: int, count: int) -> Ids:
        """Of the entries that share at least the last 2 tokens those that share most, and of these the
        newest, `count` at most."""
        shifts = (0, 16, 32)
        low = [code >> shift << shift for shift in shifts]
        high = [first | (1 << shift) - 1 for first, shift in zip(low, shifts, strict=True)]
        begins = np.searchsorted(self._codes, np.array(low, np.uint64), "left").tolist()
        ends = np.searchsorted(self._codes, np.array(high, np.uint64), "right").tolist()
        if begins[-1] == ends[-1]:
            return self._by_tail[:0]
        if ends[0] - begins[0] >= count:
            return self._by_tail[ends[0] - count : ends[0]][::-1]
        begin, end = max(begins[-1], begins[0] - _SAME_TAIL), min(ends[-1], ends[0] + _SAME_TAIL)
        ids = self._by_tail[begin:end]
        merit = shared_tail(self._codes[begin:end], code) << _ID_BITS | ids
        return ids[np.argpartition(-merit, count)[:count]] if len(ids) > count else ids
