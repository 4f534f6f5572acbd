"""Entries and keys for tests."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from agent.link.identity import Identity
from protocol.memory import Entry, sign_entry

SPACE = b"space of tests.."
TAIL = b"tail8byt"
WIDTH = 32


def someone(number: int = 0) -> Identity:
    """A device's key, the same for the same number."""
    return Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))


def key_of(number: int, width: int = WIDTH) -> NDArray[np.int8]:
    """(width,) a random direction, the same for the same number."""
    return np.random.default_rng(number).integers(-127, 128, width).astype(np.int8)


def entry(
    who: Identity,
    number: int = 0,
    *,
    token: int = 7,
    p: float = 0.5,
    count: int = 1,
    space: bytes = SPACE,
    tail: bytes = TAIL,
    signed: bool = True,
) -> Entry:
    made = Entry(space, key_of(number).tobytes(), tail, token, p, count, 1_800_000_000, who.public)
    return sign_entry(made, who.sign) if signed else made
