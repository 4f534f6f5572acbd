"""What secure rounds add up: fixed-point numbers modulo 2^64, so that sums are exact and masks uniform.

A contribution is six numbers: the device's weight, weight * threshold; then, if it tells its statistics, the weight
again and weight * each of them, else 0. They are multiples of 2^-32 of at most 2^10 * 2^4 in size, so that a sum of 32
takes 51 bits of 63: it can't overflow. The mean threshold is off by at most 2^-32 / the mean weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ProtocolError
from protocol.rounds import STATISTICS

MAX_WEIGHT = 1024.0  # nobody counts for more, however much it has seen
MAX_SLOPE = 16.0
WIDTH = 3 + len(STATISTICS)
MASK_BYTES = 8 * WIDTH

_ONE = 1 << 32
_LEAST_WEIGHT = 2.0**-10  # so that the rounding stays below 2^-22
_BOUNDS = (1.0, 1.0, MAX_SLOPE)  # of STATISTICS

Vector: TypeAlias = NDArray[np.uint64]  # (WIDTH,), modulo 2^64


@dataclass(frozen=True, slots=True)
class Sum:
    """What the edge learns of `devices` devices. `threshold`, `statistics`: means weighted by evidence (that of each
    device counts up to MAX_WEIGHT); None: nobody told any."""

    devices: int
    evidence: float
    threshold: float
    statistics: list[float] | None


def contribution(threshold: float, evidence: float, statistics: Sequence[float] | None) -> Vector:
    """As in `protocol.rounds.Update`; what is out of bounds is clipped."""
    # rounded first, so that no product exceeds its bound times the weight by more than its own rounding
    weight = round(min(max(evidence, _LEAST_WEIGHT), MAX_WEIGHT) * _ONE) / _ONE
    values = [1.0, min(max(threshold, 0.0), 1.0), 0.0, *[0.0] * len(STATISTICS)]
    if statistics is not None:
        lowest = (0.0, 0.0, -MAX_SLOPE)
        values[2:] = [1.0, *(min(max(x, low), high) for x, low, high in zip(statistics, lowest, _BOUNDS, strict=True))]
    return np.array([round(weight * value * _ONE) % (1 << 64) for value in values], np.uint64)


def packed(vector: Vector) -> bytes:
    """MASK_BYTES, little-endian."""
    return vector.astype("<u8").tobytes()


def unpacked(data: bytes) -> Vector:
    return np.frombuffer(data, "<u8").astype(np.uint64)


def nothing() -> Vector:
    return np.zeros(WIDTH, np.uint64)


def read(total: Vector, devices: int) -> Sum:
    """The sum of so many contributions. Raises ProtocolError if it can't be one: then somebody has lied."""
    weight, weighted, told, *stated = (int(value) / _ONE for value in total.astype(np.int64))
    rounding = devices / _ONE
    possible = (
        0.0 < weight <= devices * MAX_WEIGHT
        and 0.0 <= weighted <= weight + rounding
        and 0.0 <= told <= weight
        and all(abs(value) <= told * bound + rounding for value, bound in zip(stated, _BOUNDS, strict=True))
        and all(value >= 0.0 for value in stated[:2])
    )
    if not possible:
        raise ProtocolError("a cohort's sum is out of range: one of its devices has sent something else than it should")
    means = [value / told for value in stated] if told else None
    return Sum(devices, weight, min(weighted / weight, 1.0), means)
