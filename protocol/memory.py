"""Memory entries as they cross a wire: what one device learned at one step, signed by it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from protocol.signing import verify

SPACE_BYTES = 16
TAIL_BYTES = 8
ORIGIN_BYTES = 32
SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 8192
MAX_TOKEN = (1 << 31) - 1
MAX_COUNT = 1000
MAX_TIME = 1 << 40

_DOMAIN = b"skerry/1/entry\0"  # a signature over anything else can never be passed off as one over an entry
_BODY = struct.Struct(f">{SPACE_BYTES}s{TAIL_BYTES}sIdIQ{ORIGIN_BYTES}s")

Flaw: TypeAlias = Literal["malformed", "absurd", "bad_signature"]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One step that was resolved: in this state, the next token was `token`.

    `space` (16 bytes) names what the key was made with: model file, adapter, layer and recipe; keys of two spaces are
    never compared. `key` (d,) int8 and `tail` (8 bytes: hashes of the last 1, 2, 4 and 8 tokens, two bytes each) say
    where. `p`: the LLM's probability of `token`, in (0, 1]. `count`: how often the origin saw it confirmed, from 1.
    `time`: Unix seconds by the origin's clock, for people; nothing is decided by it. `origin`: the device's Ed25519
    public key. `signature` (64 bytes) covers everything else.
    """

    space: bytes
    key: bytes
    tail: bytes
    token: int
    p: float
    count: int
    time: int
    origin: bytes
    signature: bytes = b""


def signed_body(entry: Entry) -> bytes:
    """What the signature covers: a prefix, the fixed fields big-endian, then the key. The entry must have no
    `value_flaw`."""
    fixed = (entry.space, entry.tail, entry.token, entry.p, entry.count, entry.time, entry.origin)
    return _DOMAIN + _BODY.pack(*fixed) + entry.key


def sign_entry(entry: Entry, sign: Callable[[bytes], bytes]) -> Entry:
    """The entry with a signature; `sign` has to be its origin's. Raises ValueError if nobody would accept it."""
    if flaw := value_flaw(entry):
        raise ValueError(f"an entry with {flaw} fields cannot be signed")
    return msgspec.structs.replace(entry, signature=sign(signed_body(entry)))


def value_flaw(entry: Entry) -> Flaw | None:
    """What is wrong with its fields: lengths (malformed) or values that no honest device sends (absurd)."""
    if (
        len(entry.space) != SPACE_BYTES
        or len(entry.tail) != TAIL_BYTES
        or len(entry.origin) != ORIGIN_BYTES
        or not 0 < len(entry.key) <= MAX_KEY_BYTES
    ):
        return "malformed"
    sound = (
        0 <= entry.token <= MAX_TOKEN
        and math.isfinite(entry.p)
        and 0.0 < entry.p <= 1.0
        and 1 <= entry.count <= MAX_COUNT
        and 0 <= entry.time < MAX_TIME
        and entry.key.count(0) < len(entry.key)  # a key of length 0 is near to nothing
    )
    return None if sound else "absurd"


def check_entry(entry: Entry) -> Flaw | None:
    """Why nobody should believe that `origin` said this; None: it did. About 0.1 ms."""
    if flaw := value_flaw(entry):
        return flaw
    genuine = len(entry.signature) == SIGNATURE_BYTES and verify(entry.origin, entry.signature, signed_body(entry))
    return None if genuine else "bad_signature"
