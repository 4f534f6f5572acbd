"""Shamir's secret sharing (Communications of the ACM 22, 1979) of 16-byte secrets, over the prime field of 2^130 - 5.

`split` makes n shares, any `threshold` of which give the secret back; fewer say nothing about it. A share that was
changed gives another secret: check what `combine` returns against something known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

SECRET_BYTES = 16
SHARE_BYTES = 17
PRIME = (1 << 130) - 5  # the smallest field that such a secret surely fits into and that is easily checked


def split(secret: bytes, threshold: int, count: int, random: Callable[[int], bytes]) -> list[bytes]:
    """`count` shares of 17 bytes; that at place i is the polynomial at i + 1. `random`: so many secret bytes."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"cannot split {len(secret)} bytes into {count} shares of which {threshold} suffice")
    # 32 bytes modulo the prime are uniform up to 2^-126
    coefficients = [int.from_bytes(random(32), "big") % PRIME for _ in range(threshold - 1)]
    shares = []
    for x in range(1, count + 1):
        y = 0
        for coefficient in coefficients:
            y = (y + coefficient) * x % PRIME
        y = (y + int.from_bytes(secret, "big")) % PRIME
        shares.append(y.to_bytes(SHARE_BYTES, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from exactly as many shares as are needed, by place. Raises ValueError if they give none."""
    secret = 0
    places = tuple(sorted(shares))
    for place, weight in zip(places, _weights(places), strict=True):
        value = int.from_bytes(shares[place], "big")
        if len(shares[place]) != SHARE_BYTES or value >= PRIME:
            raise ValueError("a malformed share")
        secret = (secret + weight * value) % PRIME
    if secret >= 1 << 8 * SECRET_BYTES:
        raise ValueError("these shares do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=128)  # the secrets of a cohort are all put together from the same places
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients at 0."""
    weights = []
    for mine in places:
        above = below = 1
        for other in places:
            if other != mine:
                above = above * (other + 1) % PRIME
                below = below * (other - mine) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
