"""A device's part in a secure round (protocol/secure.py): a state machine without threads, clock or network.

    join ──► Join    Roll ──► Shares    Relay ──► Masked    Survivors ──► Consent    Proof ──► Reveal

Each answer is given once. What does not fit into the present step, or would have the device give away more than the
sum, is refused and counted in `refused` by its reason, and changes nothing. Seeds and keys are in RAM only: a device
that restarts in mid-round is one that left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from agent.link.identity import Identity
from protocol.errors import ProtocolError
from protocol.secure import (
    LEAST_MEMBERS,
    Cohort,
    Consent,
    Join,
    Masked,
    Member,
    Message,
    Proof,
    Relay,
    Reveal,
    Roll,
    Setting,
    Shares,
    Survivors,
)
from protocol.shamir import SECRET_BYTES, SHARE_BYTES, split
from protocol.signing import verify
from protocol.sums import Vector, packed
from protocol.topics import Cluster

_NONCE = bytes(12)  # each key seals one box


class _Refused(Exception):
    """`args[0]`: the reason, as it is counted."""


@dataclass(slots=True)
class _Session:
    """One round. `cohort` is there once the roll was accepted; `held`: by member, its own mask's share and its key
    seed's; `dealers`, `survivors`: as this device has accepted them."""

    setting: Setting
    until: float
    value: Vector
    own_seed: bytes
    key_seed: bytes
    sealing: X25519PrivateKey
    masking: X25519PrivateKey
    me: Member
    cohort: Cohort | None = None
    keys: dict[int, bytes] = field(default_factory=dict)  # identities, by place
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    dealers: frozenset[int] | None = None
    survivors: frozenset[int] | None = None


class Participant:
    """`key_of`: a device's identity by name, as its status announced it; None: unknown. `least`: members of the
    smallest cohort that this device takes part in. `random`: so many secret bytes, `os.urandom` for one. Not
    thread-safe."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        identity: Identity,
        key_of: Callable[[str], bytes | None],
        random: Callable[[int], bytes],
        least: int = LEAST_MEMBERS,
    ) -> None:
        self.refused: Counter[str] = Counter()
        self._cluster = cluster
        self._name = name
        self._identity = identity
        self._key_of = key_of
        self._random = random
        self._least = max(least, LEAST_MEMBERS)
        self._session: _Session | None = None

    def join(self, round: int, subject: str, value: Vector, until: float) -> Join:
        """Begins the round, and ends one that was going on. `value`: `protocol.sums.contribution`; `until`: when the
        keys are thrown away. The caller sees to it that it joins each round once."""
        setting = Setting(self._cluster, round, subject)
        own_seed, key_seed = self._random(SECRET_BYTES), self._random(SECRET_BYTES)
        sealing = X25519PrivateKey.from_private_bytes(self._random(32))
        masking = setting.masking_key(self._name, key_seed)
        keys = sealing.public_key().public_bytes_raw(), masking.public_key().public_bytes_raw()
        promise = setting.promise(self._name, own_seed)
        signature = self._identity.sign(setting.member(self._name, *keys, promise))
        me = Member(self._name, *keys, promise, signature)
        self._session = _Session(setting, until, value, own_seed, key_seed, sealing, masking, me)
        return Join(round, subject, *keys, promise, signature)

    def heard(self, message: Message, now: float) -> list[Message]:
        """What the edge said, and what to send to it: one message or none. `now`: by the clock of `until`."""
        session = self._session
        if session is not None and now > session.until:
            session = self._session = None
        try:
            if session is None:
                raise _Refused("no_round")
            return [self._answer(session, message)]
        except _Refused as refusal:
            self.refused[refusal.args[0]] += 1
        except ProtocolError:
            self.refused["weak_key"] += 1
        return []

    def _answer(self, session: _Session, message: Message) -> Message:
        if isinstance(message, Roll):
            return self._shares(session, message)
        if isinstance(message, Join | Shares | Masked | Consent | Reveal):
            raise _Refused("out_of_step")  # what devices say
        cohort = session.cohort
        if cohort is None:
            raise _Refused("out_of_step")
        if message.cohort != cohort.id:
            raise _Refused("other_cohort")
        if isinstance(message, Relay):
            return self._masked(session, cohort, message)
        if isinstance(message, Survivors):
            return self._consent(session, cohort, message)
        return self._reveal(session, cohort, message)

    def _shares(self, session: _Session, roll: Roll) -> Shares:
        if session.cohort is not None:
            raise _Refused("out_of_step")
        if (roll.round, roll.subject) != (session.setting.round, session.setting.subject):
            raise _Refused("other_round")
        cohort = Cohort(session.setting, roll.members)
        keys = self._believed(session, cohort)
        me, count = cohort.places[self._name], len(cohort.members)
        own = split(session.own_seed, cohort.threshold, count, self._random)
        key = split(session.key_seed, cohort.threshold, count, self._random)
        boxes: list[bytes | None] = [
            None if to == me else self._box(session, cohort, me, to).encrypt(_NONCE, own[to] + key[to], None)
            for to in range(count)
        ]
        session.cohort, session.keys, session.held = cohort, keys, {me: (own[me], key[me])}
        return Shares(cohort.id, boxes)

    def _believed(self, session: _Session, cohort: Cohort) -> dict[int, bytes]:
        """The members' identities, if the roll names as many real and different devices as it must, and this one."""
        members = cohort.members
        names = [member.name for member in members]
        if len(members) < self._least:
            raise _Refused("too_few")
        if names != sorted(set(names)) or session.me not in members:
            raise _Refused("false_roll")
        keys: dict[int, bytes] = {}
        for place, member in enumerate(members):
            key = self._identity.public if member == session.me else self._key_of(member.name)
            flaw = session.setting.flaw(member, key)
            if flaw is not None or key is None:
                raise _Refused(flaw or "unknown")
            keys[place] = key
        if len(set(keys.values())) < len(keys):
            raise _Refused("false_roll")  # one device under two names
        return keys

    def _masked(self, session: _Session, cohort: Cohort, relay: Relay) -> Masked:
        """Goes on only if at least `threshold` members, this one among them, have shown by a box that opens that they
        were told of the same cohort."""
        if session.dealers is not None:
            raise _Refused("out_of_step")
        me, dealers = cohort.places[self._name], _set(relay.dealers, cohort)
        if me not in dealers or len(relay.boxes) != len(cohort.members):
            raise _Refused("malformed")
        held = dict(session.held)
        for place in dealers - {me}:
            box = relay.boxes[place]
            try:
                shares = self._box(session, cohort, me, place, sends=False).decrypt(_NONCE, box or b"", None)
            except InvalidTag:
                self.refused["bad_box"] += 1  # its masks can still be undone, if others hold its shares
                continue
            held[place] = shares[:SHARE_BYTES], shares[SHARE_BYTES:]
        if len(held) < cohort.threshold:
            raise _Refused("too_few")
        values = session.value + cohort.own_mask(me, session.own_seed)
        for place in dealers - {me}:
            values = values + cohort.pair_mask(session.masking, me, place)
        session.held, session.dealers = held, dealers
        return Masked(cohort.id, packed(values))

    def _consent(self, session: _Session, cohort: Cohort, message: Survivors) -> Consent:
        if session.dealers is None or session.survivors is not None:
            raise _Refused("out_of_step")
        survivors = _set(message.who, cohort)
        if not survivors <= session.dealers or cohort.places[self._name] not in survivors:
            raise _Refused("false_survivors")
        if len(survivors) < cohort.threshold:
            raise _Refused("too_few")
        session.survivors = survivors
        return Consent(cohort.id, self._identity.sign(cohort.consent(list(session.dealers), list(survivors))))

    def _reveal(self, session: _Session, cohort: Cohort, proof: Proof) -> Reveal:
        """Of each dealer one of its two shares: never both, since this is answered once."""
        if session.dealers is None or session.survivors is None:
            raise _Refused("out_of_step")
        signed = cohort.consent(list(session.dealers), list(session.survivors))
        given = list(zip(range(len(cohort.members)), proof.signatures, strict=False))
        consents = sum(
            signature is not None and place in session.survivors and verify(session.keys[place], signature, signed)
            for place, signature in given
        )
        if consents < cohort.threshold:
            raise _Refused("no_proof")
        self._session = None
        shares: list[bytes | None] = [None] * len(cohort.members)
        for place, (own, key) in session.held.items():
            shares[place] = own if place in session.survivors else key
        return Reveal(cohort.id, shares)

    def _box(self, session: _Session, cohort: Cohort, me: int, other: int, *, sends: bool = True) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(cohort.box_key(session.sealing, me, other, sends=sends))


def _set(places: list[int], cohort: Cohort) -> frozenset[int]:
    if len(set(places)) != len(places) or max(places) >= len(cohort.members):
        raise _Refused("malformed")
    return frozenset(places)
