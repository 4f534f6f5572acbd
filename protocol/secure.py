"""Secure rounds: the edge learns the sum of a cohort's contributions, and no single one.

The protocol of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017, DOI
10.1145/3133956.3133982), figure 4, with its consistency check against an edge that lies:

    device                             edge of the cluster
                                 ←     Call(round, secure)      retained, to all; protocol/rounds.py
    Join(keys, promise)          →
                                 ←     Roll(members)            the cohort: who else takes part
    Shares(boxes)                →                              of the device's two seeds, sealed for each member
                                 ←     Relay(boxes)
    Masked(values)               →                              value + own mask ± a mask shared with each member
                                 ←     Survivors(who)           whose values came
    Consent(signature)           →                              "this list, and I have signed no other"
                                 ←     Proof(signatures)
    Reveal(shares)               →                              own masks of survivors, key seeds of those who left

A survivor's own mask and a lost device's key seed are put together from the shares of `threshold` members. Nobody
reveals both for one member, so the edge can undo the masks of the sum alone. Everything that is signed, derived or
sealed is bound to the fleet, the cluster, the round, the subject, and the members with all their keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, TypeAlias

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from protocol.errors import ProtocolError
from protocol.reading import reader
from protocol.rounds import Number, Subject
from protocol.shamir import SHARE_BYTES
from protocol.signing import verify
from protocol.sums import MASK_BYTES, Vector, unpacked
from protocol.topics import LEVEL, SECURE, Cluster

VERSION = 1
LEAST_MEMBERS = 3  # of two, each knows the other's value from the sum
MAX_MEMBERS = 32
BOX_BYTES = 2 * SHARE_BYTES + 16  # two shares, and the tag of ChaCha20-Poly1305

_Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
_Box = Annotated[bytes, Meta(min_length=BOX_BYTES, max_length=BOX_BYTES)]
_Share = Annotated[bytes, Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
_All = Meta(min_length=LEAST_MEMBERS, max_length=MAX_MEMBERS)  # one for each member, in the roll's order
_Place = Annotated[int, Meta(ge=0, lt=MAX_MEMBERS)]  # in the roll


class _Step(msgspec.Struct, frozen=True, tag_field="step", tag=str.lower, kw_only=True):
    version: Literal[1] = 1


class Join(_Step, frozen=True):
    """`sealing`, `masking`: X25519 keys, new for this round. `promise`: of the seed of the device's own mask
    (`promise`). `signature`: by the device's identity, of `Setting.member`."""

    round: Number
    subject: Subject
    sealing: _Key
    masking: _Key
    promise: _Key
    signature: _Signature


class Member(msgspec.Struct, frozen=True):
    """What one device wrote into its Join."""

    name: Annotated[str, Meta(pattern=LEVEL)]
    sealing: _Key
    masking: _Key
    promise: _Key
    signature: _Signature


class Roll(_Step, frozen=True):
    """`members`: by name, in order."""

    round: Number
    subject: Subject
    members: Annotated[list[Member], _All]


class _Of(_Step, frozen=True):
    """`cohort`: `Cohort.id`."""

    cohort: _Key


class Shares(_Of, frozen=True):
    """`boxes`: for each member two shares, sealed; None for the sender itself."""

    boxes: Annotated[list[_Box | None], _All]


class Relay(_Of, frozen=True):
    """`dealers`: the members whose shares came. `boxes`: of each member, for the receiver; None: there is none."""

    dealers: Annotated[list[_Place], _All]
    boxes: Annotated[list[_Box | None], _All]


class Masked(_Of, frozen=True):
    """`values`: a packed `Vector`."""

    values: Annotated[bytes, Meta(min_length=MASK_BYTES, max_length=MASK_BYTES)]


class Survivors(_Of, frozen=True):
    who: Annotated[list[_Place], _All]


class Consent(_Of, frozen=True):
    """`signature`: of `Cohort.consent`."""

    signature: _Signature


class Proof(_Of, frozen=True):
    """`signatures`: the consents of the members; None: there is none."""

    signatures: Annotated[list[_Signature | None], _All]


class Reveal(_Of, frozen=True):
    """`shares`: of each survivor's own mask, of each other dealer's key seed; None: the sender has none."""

    shares: Annotated[list[_Share | None], _All]


Message: TypeAlias = Join | Roll | Shares | Relay | Masked | Survivors | Consent | Proof | Reveal


def bind(*parts: str | int | bytes) -> bytes:
    """The parts as bytes that no other parts give."""
    raw = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in raw)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a secure round is about, known before its cohorts are."""

    cluster: Cluster
    round: int
    subject: str

    def bind(self, purpose: str, *parts: str | int | bytes) -> bytes:
        where = (self.cluster.fleet, self.cluster.name, self.round, self.subject)
        return bind(f"skerry/1/secure/{purpose}", *where, *parts)

    def member(self, name: str, sealing: bytes, masking: bytes, promise: bytes) -> bytes:
        """What a device signs when it joins."""
        return self.bind("join", name, sealing, masking, promise)

    def promise(self, name: str, seed: bytes) -> bytes:
        """Tells a right seed from a wrong one, and nothing else of it: the seed has 128 random bits."""
        return hashlib.sha256(self.bind("promise", name, seed)).digest()

    def masking_key(self, name: str, seed: bytes) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(derived(seed, self.bind("masking", name), 32))

    def flaw(self, member: Member, key: bytes | None) -> str | None:
        """Why this is not what the device with the identity `key` sent; None: it is."""
        if key is None:
            return "unknown"
        if not verify(key, member.signature, self.member(member.name, member.sealing, member.masking, member.promise)):
            return "bad_signature"
        return None


class Cohort:
    """The members of one sum. `id`: 32 bytes that stand for all of this; `threshold`: how many must stay to the end."""

    def __init__(self, setting: Setting, members: Sequence[Member]) -> None:
        self.setting = setting
        self.members = tuple(members)
        self.threshold = threshold(len(self.members))
        self.places = {member.name: place for place, member in enumerate(self.members)}

    @cached_property
    def id(self) -> bytes:
        parts = [bind(each.name, each.sealing, each.masking, each.promise) for each in self.members]
        return hashlib.sha256(self.setting.bind("cohort", *parts)).digest()

    def bind(self, purpose: str, *parts: str | int | bytes) -> bytes:
        return self.setting.bind(purpose, self.id, *parts)

    def consent(self, dealers: Sequence[int], survivors: Sequence[int]) -> bytes:
        """What a member signs before it reveals anything."""
        return self.bind("consent", bytes(sorted(dealers)), bytes(sorted(survivors)))

    def own_mask(self, place: int, seed: bytes) -> Vector:
        return unpacked(derived(seed, self.bind("own", place), MASK_BYTES))

    def pair_mask(self, key: X25519PrivateKey, mine: int, other: int) -> Vector:
        """What the member at `mine`, whose masking key this is, adds; the one at `other` adds the opposite. Raises
        ProtocolError if the other's key is weak, as `box_key` does."""
        shared = _exchange(key, self.members[other].masking)
        mask = unpacked(derived(shared, self.bind("pair", min(mine, other), max(mine, other)), MASK_BYTES))
        return mask if mine < other else -mask

    def box_key(self, key: X25519PrivateKey, mine: int, other: int, *, sends: bool) -> bytes:
        """For what one member sends the other, a single box: so its nonce may be constant."""
        way = (mine, other) if sends else (other, mine)
        return derived(_exchange(key, self.members[other].sealing), self.bind("box", *way), 32)


def threshold(members: int) -> int:
    """More than two thirds: 2t > n + c then holds for every c < n / 3 members that help a lying edge, so that it can
    get no second list of survivors consented to (theorem 6.5 of the paper)."""
    return 2 * members // 3 + 1


def derived(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(secret)


def weak(public: bytes) -> bool:
    """Whether the X25519 key is a point of small order, with which every shared secret is 0 (RFC 7748, section 6)."""
    try:
        _exchange(X25519PrivateKey.from_private_bytes(bytes(range(32))), public)  # any key shows it
    except ProtocolError:
        return True
    return False


def _exchange(key: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError("a key with which every shared secret is 0") from None


def encode(message: Message) -> bytes:
    return _encode(message)


_encode = msgspec.json.Encoder().encode
_decode: Callable[[bytes], Message] = msgspec.json.Decoder(Message).decode

decode = reader(SECURE, _decode, VERSION)
"""None for a newer version. Raises ProtocolError."""
