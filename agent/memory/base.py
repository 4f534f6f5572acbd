"""What the parts of the memory say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.memory import Entry

Key = NDArray[np.int8]  # (d,)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry near a query. `similarity`: cosine of the int8 keys, exact. `tail`: how many of the last tokens are
    the same, one of 0, 1, 2, 4, 8. `trust`: in [0, 1], falls when the entry proves wrong."""

    id: int
    similarity: float
    tail: int
    token: int
    p: float
    count: int
    trust: float
    origin: bytes
    key: Key


class Memory(Protocol):
    """Safe to use from several threads; `neighbours` and `learn` never wait for the disk."""

    def neighbours(self, space: bytes, key: Key, tail: bytes, k: int) -> list[Neighbour]:
        """The k most similar entries of the space, most similar first; fewer if it holds fewer."""
        ...

    def learn(self, entry: Entry) -> None:
        """Findable when this returns, durable a moment later (`flush` waits for that)."""
        ...

    def add(self, entries: Sequence[Entry]) -> int:
        """Findable and durable when this returns. Idempotent: how many were new."""
        ...
