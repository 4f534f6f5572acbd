"""What the parts of the memory say to each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
