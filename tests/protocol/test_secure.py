"""Messages and arithmetic of secure rounds: what can't be valid is refused, sums are exact, masks cancel."""

from __future__ import annotations

import contextlib
import itertools
import math
import os

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol.errors import ProtocolError
from protocol.rounds import MAX_NUMBER, STATISTICS
from protocol.secure import (
    BOX_BYTES,
    MAX_MEMBERS,
    VERSION,
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
    bind,
    decode,
    encode,
    threshold,
    weak,
)
from protocol.shamir import PRIME, SHARE_BYTES, combine, split
from protocol.sums import MASK_BYTES, MAX_SLOPE, MAX_WEIGHT, contribution, nothing, packed, read, unpacked
from protocol.topics import SECURE, Cluster

SUBJECT = "00112233445566aa"


def some(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


KEY, SIGNATURE = some(32), some(64)
NUMBER = st.integers(0, MAX_NUMBER)
PLACES = st.lists(st.integers(0, MAX_MEMBERS - 1), min_size=3, max_size=MAX_MEMBERS)
MEMBER = st.builds(Member, st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True), KEY, KEY, KEY, SIGNATURE)


def each(one: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[bytes | None]]:
    return st.lists(st.none() | one, min_size=3, max_size=MAX_MEMBERS)


MESSAGE: st.SearchStrategy[Message] = st.one_of(
    st.builds(Join, NUMBER, st.just(SUBJECT), KEY, KEY, KEY, SIGNATURE),
    st.builds(Roll, NUMBER, st.just(SUBJECT), st.lists(MEMBER, min_size=3, max_size=MAX_MEMBERS)),
    st.builds(Shares, KEY, each(some(BOX_BYTES))),
    st.builds(Relay, KEY, PLACES, each(some(BOX_BYTES))),
    st.builds(Masked, KEY, some(MASK_BYTES)),
    st.builds(Survivors, KEY, PLACES),
    st.builds(Consent, KEY, SIGNATURE),
    st.builds(Proof, KEY, each(SIGNATURE)),
    st.builds(Reveal, KEY, each(some(SHARE_BYTES))),
)


class TestMessages:
    @given(message=MESSAGE)
    def test_what_is_sent_is_what_is_heard(self, message: Message) -> None:
        assert decode(encode(message)) == message

    def test_the_largest_messages_fit(self) -> None:
        member = Member("n" * 64, bytes(32), bytes(32), bytes(32), bytes(64))
        everybody: list[bytes | None] = [bytes(64)] * MAX_MEMBERS
        for message in (Roll(MAX_NUMBER, SUBJECT, [member] * MAX_MEMBERS), Proof(bytes(32), everybody)):
            assert len(encode(message)) <= SECURE.limit / 2

    @given(payload=st.binary(max_size=300))
    def test_noise_is_malformed(self, payload: bytes) -> None:
        with pytest.raises(ProtocolError):
            decode(payload)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("step", "sing"),
            ("step", None),
            ("version", 0),
            ("version", "1"),
            ("cohort", "AAAA"),
            ("cohort", "not base64 at all!"),
            ("boxes", []),
            ("boxes", [None] * 33),
            ("boxes", ["AAAA", None, None]),
        ],
    )
    def test_fields_out_of_bounds(self, field: str, value: object) -> None:
        message = msgspec.json.decode(encode(Shares(bytes(32), [None, bytes(BOX_BYTES), bytes(BOX_BYTES)])))
        with pytest.raises(ProtocolError):
            decode(msgspec.json.encode({**message, field: value}))

    @pytest.mark.parametrize(("field", "value"), [("who", [0, 1, 32]), ("who", [-1, 0, 1]), ("who", [0, 1])])
    def test_places_out_of_bounds(self, field: str, value: object) -> None:
        message = msgspec.json.decode(encode(Survivors(bytes(32), [0, 1, 2])))
        with pytest.raises(ProtocolError):
            decode(msgspec.json.encode({**message, field: value}))

    def test_too_large(self) -> None:
        with pytest.raises(ProtocolError, match="over the limit"):
            decode(encode(Consent(bytes(32), bytes(64))) + b" " * SECURE.limit)

    def test_later_versions_and_fields(self) -> None:
        message = msgspec.json.decode(encode(Consent(bytes(32), bytes(64))))
        assert decode(msgspec.json.encode({**message, "version": VERSION + 1})) is None
        assert decode(msgspec.json.encode({**message, "more": 1})) == Consent(bytes(32), bytes(64))


class TestSharing:
    @settings(deadline=None)
    @given(secret=some(16), count=st.integers(1, MAX_MEMBERS), data=st.data())
    def test_any_threshold_of_them_give_the_secret(self, secret: bytes, count: int, data: st.DataObject) -> None:
        need = data.draw(st.integers(1, count))
        shares = split(secret, need, count, os.urandom)
        chosen = data.draw(st.permutations(range(count)))[:need]
        assert combine({place: shares[place] for place in chosen}) == secret

    @given(secret=some(16), claimed=some(16))
    def test_one_fewer_fits_every_secret(self, secret: bytes, claimed: bytes) -> None:
        """With any two of three shares there is, for each secret that one may claim, a third share that proves it."""
        held = split(secret, 3, 3, os.urandom)[:2]
        # the line through Lagrange's weights at 0 for x = 1, 2, 3: 3 y1 - 3 y2 + y3
        first, second = (int.from_bytes(share, "big") for share in held)
        third = (int.from_bytes(claimed, "big") - 3 * first + 3 * second) % PRIME
        assert combine(dict(enumerate([*held, third.to_bytes(SHARE_BYTES, "big")]))) == claimed

    def test_a_changed_share_is_noticed_or_gives_another_secret(self) -> None:
        shares = split(bytes(16), 2, 3, os.urandom)
        wrong = bytes([0, *shares[0][1:-1], shares[0][-1] ^ 1])
        with contextlib.suppress(ValueError):
            assert combine({0: wrong, 1: shares[1]}) != bytes(16)

    @pytest.mark.parametrize("share", [b"", bytes(16), bytes(18), PRIME.to_bytes(17, "big"), b"\xff" * 17])
    def test_malformed_shares(self, share: bytes) -> None:
        with pytest.raises(ValueError):
            combine({0: share, 1: bytes(17)})

    @pytest.mark.parametrize(("secret", "need", "count"), [(bytes(15), 2, 3), (bytes(16), 0, 3), (bytes(16), 4, 3)])
    def test_impossible_splits(self, secret: bytes, need: int, count: int) -> None:
        with pytest.raises(ValueError):
            split(secret, need, count, os.urandom)


STATED = st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-MAX_SLOPE, MAX_SLOPE)).map(list)


class TestSums:
    @given(parts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e6), STATED), min_size=1, max_size=MAX_MEMBERS))
    @example(parts=[(0.0, 0.9196110040088288, [0.0, 0.0, 16.0])])  # the weight's rounding counts sixteenfold
    @example(parts=[(1.0, 0.9196110040088288, [1.0, 1.0, -16.0])] * MAX_MEMBERS)
    def test_means_are_those_of_the_devices(self, parts: list[tuple[float, float, list[float] | None]]) -> None:
        total = sum((contribution(*part) for part in parts), nothing())
        result = read(total, len(parts))
        weights = [min(max(evidence, 2.0**-10), MAX_WEIGHT) for _, evidence, _ in parts]
        assert result.devices == len(parts)
        assert result.evidence == pytest.approx(sum(weights))
        mean = sum(w * t for w, (t, _, _) in zip(weights, parts, strict=True)) / sum(weights)
        assert result.threshold == pytest.approx(mean, abs=2**-20)
        telling = [(w, stated) for w, (_, _, stated) in zip(weights, parts, strict=True) if stated is not None]
        if not telling:
            assert result.statistics is None
            return
        assert result.statistics is not None
        for at in range(len(STATISTICS)):
            mean = sum(w * stated[at] for w, stated in telling) / sum(w for w, _ in telling)
            assert result.statistics[at] == pytest.approx(mean, abs=2**-20)

    @given(data=some(MASK_BYTES), other=some(MASK_BYTES))
    def test_vectors_are_numbers_modulo_2_to_the_64(self, data: bytes, other: bytes) -> None:
        one, two = unpacked(data), unpacked(other)
        assert packed(one) == data
        assert packed(one + two - two) == data
        assert [int(x) for x in one + two] == [(int(a) + int(b)) % 2**64 for a, b in zip(one, two, strict=True)]

    def test_nobody_counts_for_more_than_the_cap(self) -> None:
        assert packed(contribution(0.5, 1e12, None)) == packed(contribution(0.5, MAX_WEIGHT, None))
        assert packed(contribution(7.0, 1.0, [2.0, -3.0, 99.0])) == packed(
            contribution(1.0, 1.0, [1.0, 0.0, MAX_SLOPE])
        )

    @pytest.mark.parametrize("devices", [1, MAX_MEMBERS])
    def test_the_largest_sums_do_not_overflow(self, devices: int) -> None:
        for slope in (-MAX_SLOPE, MAX_SLOPE):
            total = sum((contribution(1.0, MAX_WEIGHT, [1.0, 1.0, slope]) for _ in range(devices)), nothing())
            assert read(total, devices).statistics == [1.0, 1.0, slope]

    @pytest.mark.parametrize(
        ("at", "value"), [(0, 0), (0, -1), (0, 2**62), (1, -1), (1, 2**62), (2, -1), (2, 2**62), (3, -1), (5, 2**62)]
    )
    def test_impossible_sums(self, at: int, value: int) -> None:
        total = contribution(0.5, 10.0, [0.1, 0.2, 0.3])
        total[at] = value % 2**64
        with pytest.raises(ProtocolError, match="out of range"):
            read(total, 1)


def cohort_of(count: int, round: int = 7, fleet: str = "home") -> tuple[Cohort, list[X25519PrivateKey]]:
    setting = Setting(Cluster(fleet, "main"), round, SUBJECT)
    keys = [X25519PrivateKey.from_private_bytes(bytes([place + 1]) * 32) for place in range(count)]
    public = [key.public_key().public_bytes_raw() for key in keys]
    return Cohort(setting, [Member(f"d{n:02}", key, key, bytes(32), bytes(64)) for n, key in enumerate(public)]), keys


class TestMasks:
    @pytest.mark.parametrize("count", [3, 7])
    def test_they_cancel_over_the_cohort(self, count: int) -> None:
        cohort, keys = cohort_of(count)
        pairs = [(mine, other) for mine in range(count) for other in range(count) if mine != other]
        masks = [cohort.pair_mask(keys[mine], mine, other) for mine, other in pairs]
        assert not sum(masks, nothing()).any()
        assert len({packed(mask) for mask in masks}) == len(masks)

    def test_all_that_is_derived_depends_on_round_fleet_members_and_place(self) -> None:
        seen = set()
        for (cohort, keys), place in itertools.product(
            [cohort_of(3), cohort_of(4), cohort_of(3, 8), cohort_of(3, fleet="away")], (0, 1)
        ):
            seen |= {
                cohort.id if place else cohort.consent([0, 1, 2], [0, 1, 2]),
                packed(cohort.own_mask(place, bytes(16))),
                packed(cohort.pair_mask(keys[place], place, 2)),
                cohort.box_key(keys[place], place, 2, sends=True),
                cohort.box_key(keys[place], place, 2, sends=False),
                cohort.setting.promise(f"{place}/{len(keys)}", bytes(16)),
            }
        assert len(seen) == 8 * 6

    def test_a_box_key_is_the_same_at_both_ends_and_for_one_way(self) -> None:
        cohort, keys = cohort_of(3)
        there = cohort.box_key(keys[0], 0, 1, sends=True)
        assert there == cohort.box_key(keys[1], 1, 0, sends=False)
        assert there != cohort.box_key(keys[1], 1, 0, sends=True)

    def test_a_consent_is_to_both_lists(self) -> None:
        cohort, _ = cohort_of(4)
        lists = [
            ([0, 1, 2, 3], [0, 1, 2]),
            ([0, 1, 2], [0, 1, 2, 3]),
            ([0, 1, 2], [0, 1, 2]),
            ([0, 1, 2, 3], [1, 2, 3]),
        ]
        assert len({cohort.consent(*each) for each in lists}) == len(lists)
        assert cohort.consent([2, 1, 0], [1, 0, 2]) == cohort.consent([0, 1, 2], [0, 1, 2])

    @given(a=st.lists(st.binary(max_size=8), max_size=4), b=st.lists(st.binary(max_size=8), max_size=4))
    def test_parts_are_bound_unambiguously(self, a: list[bytes], b: list[bytes]) -> None:
        assert (bind(*a) == bind(*b)) == (a == b)

    def test_weak_keys(self) -> None:
        assert weak(bytes(32))
        assert weak(bytes([1, *bytes(31)]))
        assert not weak(X25519PrivateKey.generate().public_key().public_bytes_raw())

    @pytest.mark.parametrize("count", range(3, MAX_MEMBERS + 1))
    def test_two_lists_can_not_both_be_consented_to(self, count: int) -> None:
        """With fewer than a third of the members on the edge's side, who sign everything."""
        need, liars = threshold(count), math.ceil(count / 3) - 1
        assert need <= count
        assert 2 * need > count + liars
