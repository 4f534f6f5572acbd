"""Messages between peers: what one packs the other reads, and nothing that comes in does more than be refused."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolError
from protocol.memory import MAX_COUNT, MAX_KEY_BYTES, MAX_TOKEN, Entry, check_entry, sign_entry, value_flaw
from protocol.peers import (
    MAX_ANSWER,
    MAX_DEVICES,
    MAX_HOPS,
    MAX_NEWS,
    Answer,
    Ask,
    Directory,
    Known,
    News,
    decode_answer,
    decode_ask,
    decode_directory,
    decode_news,
    encode,
    encode_directory,
)
from protocol.topics import ANSWER, ASK, DIRECTORY, NEWS
from tests.protocol.entries import SPACE, TAIL, entry, key_of, someone

LAMP, FRIDGE = someone(1), someone(2)
ENTRY = entry(LAMP)
ASKED = Ask(2**64 - 1, SPACE, key_of(0).tobytes(), TAIL, 0.9, 2, ["A", "B"])
DEVICE = Known("lamp", "A", LAMP.public.hex(), [SPACE.hex()], 1)
HOT: list[tuple[Callable[[bytes], Any], Any, int]] = [
    (decode_news, News([ENTRY, entry(LAMP, 1)]), NEWS.limit),
    (decode_ask, ASKED, ASK.limit),
    (decode_answer, Answer(5, [ENTRY]), ANSWER.limit),
]
ALL = [(decode, encode(message), message, limit) for decode, message, limit in HOT]
ALL.append((decode_directory, encode_directory(Directory("A", [DEVICE])), Directory("A", [DEVICE]), DIRECTORY.limit))
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=40,
)


def refused_or_read(decode: Callable[[bytes], Any], payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(payload)


class TestCodec:
    @pytest.mark.parametrize(("decode", "payload", "message", "limit"), ALL)
    def test_what_is_packed_is_read(self, decode: Any, payload: bytes, message: Any, limit: int) -> None:
        assert decode(payload) == message
        assert len(payload) < limit

    @pytest.mark.parametrize(("decode", "payload", "message", "limit"), ALL)
    def test_every_truncation_is_malformed(self, decode: Any, payload: bytes, message: Any, limit: int) -> None:
        for length in range(len(payload)):
            with pytest.raises(ProtocolError):
                decode(payload[:length])

    @pytest.mark.parametrize(("decode", "payload", "message", "limit"), ALL)
    def test_oversized_is_not_even_read(self, decode: Any, payload: bytes, message: Any, limit: int) -> None:
        with pytest.raises(ProtocolError, match="over the limit"):
            decode(payload + bytes(limit))

    @pytest.mark.parametrize("decode", [decode_news, decode_ask, decode_answer, decode_directory])
    @given(payload=st.binary(max_size=400))
    def test_random_bytes(self, decode: Any, payload: bytes) -> None:
        refused_or_read(decode, payload)

    @pytest.mark.parametrize("decode", [decode_news, decode_ask, decode_answer])
    @given(fields=st.lists(anything, max_size=10), version=st.just(1) | anything)
    def test_random_fields(self, decode: Any, fields: list[Any], version: Any) -> None:
        refused_or_read(decode, msgspec.msgpack.encode([version, *fields]))

    @given(value=anything)
    def test_random_json(self, value: Any) -> None:
        refused_or_read(decode_directory, msgspec.json.encode({"version": 1, "cluster": "A", "devices": value}))
        refused_or_read(decode_directory, msgspec.json.encode({"version": 1, "cluster": "A", "devices": [value]}))

    @given(where=st.integers(0, 10_000), bit=st.integers(0, 7), which=st.sampled_from(ALL))
    def test_a_flipped_bit(self, where: int, bit: int, which: Any) -> None:
        payload = bytearray(which[1])
        payload[where % len(payload)] ^= 1 << bit
        refused_or_read(which[0], bytes(payload))

    def test_nesting_without_end_is_malformed(self) -> None:
        for decode in (decode_news, decode_ask, decode_answer):
            with pytest.raises(ProtocolError):
                decode(b"\x91" * 10_000)
        with pytest.raises(ProtocolError):
            decode_directory(b"[" * 10_000)


class TestNewer:
    @pytest.mark.parametrize("decode", [decode_news, decode_ask, decode_answer])
    def test_messages_of_another_version_are_tolerated(self, decode: Any) -> None:
        assert decode(msgspec.msgpack.encode([2, {"any": ["thing"]}])) is None
        assert decode(msgspec.msgpack.encode([2])) is None

    def test_directories_too(self) -> None:
        assert decode_directory(b'{"version": 2, "devices": "elsewhere"}') is None

    @pytest.mark.parametrize("version", [0, -1, 1.5, "1", None])
    def test_what_never_was_a_version_is_malformed(self, version: Any) -> None:
        with pytest.raises(ProtocolError):
            decode_ask(msgspec.msgpack.encode([version, 1, 2]))

    def test_additional_fields_are_ignored(self) -> None:
        for decode, message, _ in HOT:
            fields = msgspec.msgpack.decode(encode(message))
            assert decode(msgspec.msgpack.encode([*fields, "new", [1, 2]])) == message
        told = msgspec.json.decode(encode_directory(Directory("A", [DEVICE])))
        told["devices"][0]["colour"] = "green"
        assert decode_directory(msgspec.json.encode({**told, "more": 1})) == Directory("A", [DEVICE])

    def test_fields_that_an_older_device_leaves_out_have_defaults(self) -> None:
        fields = msgspec.msgpack.decode(encode(ASKED))[:6]
        ask = decode_ask(msgspec.msgpack.encode(fields))
        assert ask is not None
        assert (ask.hops, ask.visited) == (0, [])


class TestBounds:
    @pytest.mark.parametrize(
        "change",
        [
            {"id": -1},
            {"space": b"short"},
            {"key": b""},
            {"key": bytes(MAX_KEY_BYTES + 1)},
            {"tail": b"too long for a tail"},
            {"similarity": math.nan},
            {"similarity": 1.5},
            {"hops": -1},
            {"hops": MAX_HOPS + 1},
            {"visited": ["A"] * 17},
            {"visited": ["a/b"]},
            {"visited": ["#"]},
        ],
        ids=str,
    )
    def test_of_a_question(self, change: dict[str, Any]) -> None:
        with pytest.raises(ProtocolError):
            decode_ask(encode(msgspec.structs.replace(ASKED, **change)))

    @pytest.mark.parametrize("count", [0, MAX_NEWS + 1])
    def test_of_news(self, count: int) -> None:
        with pytest.raises(ProtocolError, match=str(count)):
            decode_news(encode(News([ENTRY] * count)))

    def test_of_an_answer(self) -> None:
        with pytest.raises(ProtocolError):
            decode_answer(encode(Answer(1, [ENTRY] * (MAX_ANSWER + 1))))

    @pytest.mark.parametrize(
        "change",
        [{"name": "a/b"}, {"cluster": "+"}, {"key": "00"}, {"spaces": ["zz"]}, {"hops": -1}, {"hops": MAX_HOPS + 1}],
        ids=str,
    )
    def test_of_a_directory(self, change: dict[str, Any]) -> None:
        with pytest.raises(ProtocolError):
            decode_directory(encode_directory(Directory("A", [msgspec.structs.replace(DEVICE, **change)])))

    def test_a_directory_is_not_endless(self) -> None:
        with pytest.raises(ProtocolError):
            decode_directory(encode_directory(Directory("A", [DEVICE] * (MAX_DEVICES + 1))))


class TestEntries:
    def test_a_signed_one_is_believed(self) -> None:
        assert check_entry(ENTRY) is None

    @given(
        token=st.integers(0, MAX_TOKEN),
        p=st.floats(0, 1, exclude_min=True),
        count=st.integers(1, MAX_COUNT),
        number=st.integers(0, 99),
    )
    def test_any_honest_one_survives_the_wire(self, token: int, p: float, count: int, number: int) -> None:
        made = entry(LAMP, number, token=token, p=p, count=count)
        news = decode_news(encode(News([made])))
        assert news is not None
        assert news.entries == [made]
        assert check_entry(news.entries[0]) is None

    @pytest.mark.parametrize("field", [name for name in Entry.__struct_fields__ if name != "signature"])
    def test_the_signature_covers_every_field(self, field: str) -> None:
        other = msgspec.structs.replace(
            entry(FRIDGE, 9, token=8, p=0.25, count=2, space=b"another space...", tail=b"anothert"), time=5
        )
        changed = msgspec.structs.replace(ENTRY, **{field: getattr(other, field)})
        assert check_entry(changed) == "bad_signature"

    def test_a_swapped_signature_is_found(self) -> None:
        other = entry(LAMP, 1)
        assert check_entry(msgspec.structs.replace(ENTRY, signature=other.signature)) == "bad_signature"

    @pytest.mark.parametrize("signature", [b"", bytes(64), bytes(63), bytes(65)])
    def test_no_signature_is_not_enough(self, signature: bytes) -> None:
        assert check_entry(msgspec.structs.replace(ENTRY, signature=signature)) == "bad_signature"

    def test_a_signature_over_something_else_is_not_enough(self) -> None:
        body = msgspec.msgpack.encode(msgspec.structs.replace(ENTRY, signature=b""))
        assert check_entry(msgspec.structs.replace(ENTRY, signature=LAMP.sign(body))) == "bad_signature"

    @pytest.mark.parametrize(
        "change",
        [
            {"token": -1},
            {"token": MAX_TOKEN + 1},
            {"p": 0.0},
            {"p": -0.5},
            {"p": 1.01},
            {"p": math.nan},
            {"p": math.inf},
            {"count": 0},
            {"count": MAX_COUNT + 1},
            {"time": -1},
            {"time": 1 << 63},
            {"key": bytes(32)},
        ],
        ids=str,
    )
    def test_absurd_claims_are_refused_and_never_signed(self, change: dict[str, Any]) -> None:
        wrong = msgspec.structs.replace(ENTRY, **change)
        assert value_flaw(wrong) == check_entry(wrong) == "absurd"
        with pytest.raises(ValueError, match="absurd"):
            sign_entry(wrong, LAMP.sign)

    @pytest.mark.parametrize(
        "change",
        [{"space": b""}, {"tail": bytes(9)}, {"origin": bytes(31)}, {"key": b""}, {"key": b"x" * (MAX_KEY_BYTES + 1)}],
        ids=str,
    )
    def test_fields_of_another_size_are_malformed(self, change: dict[str, Any]) -> None:
        assert check_entry(msgspec.structs.replace(ENTRY, **change)) == "malformed"
