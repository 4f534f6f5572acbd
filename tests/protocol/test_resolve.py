"""The wire: what one side packs the other reads, and nothing that comes in does more than raise ProtocolError."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import resolve as wire
from protocol.errors import ProtocolError
from protocol.resolve import Message, Sampling

OPEN = wire.Open(7, [Message("user", "Why? 😀")], "f" * 64, Sampling(0.7, 40, 0.9, 0.05, 1.1, -5), "verify", 16, 4)
ASK = wire.Ask(7, 3, 12, [1, 2, 49_151], 5, wire.pack_ids(np.arange(3)), wire.pack_floats(np.ones(3)), 0.25)
FROM_DEVICE = [OPEN, wire.Open(1, "text", "", Sampling(), "take", 1), ASK]
FROM_DEVICE += [wire.Ask(1, 2, 3, text=b"caf\xc3", draft_text=b"\xa9"), wire.Close(7)]
FROM_CLOUD = [
    wire.Hello("qwen", "f" * 64, True, 100),
    wire.Answer(7, 3, [4, 5], y_ids=wire.pack_ids(np.arange(2)), y_logp=wire.pack_floats(np.zeros(2)), y_draft=0.5),
    wire.Answer(7, 3, text=b"\xf0\x9f", y_pieces=[b"\xf0\x9f", b""], llm_tokens=3),
    wire.More(7, 3, 9),
    wire.More(7, 3, text=b" and"),
    wire.Refused(7, -1, "overloaded", "try again", 2.5),
]
DECODERS = [wire.decode_from_device, wire.decode_from_cloud]


def frame(*fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


class TestRoundTrip:
    @pytest.mark.parametrize("message", FROM_DEVICE)
    def test_from_the_device(self, message: wire.FromDevice) -> None:
        assert wire.decode_from_device(wire.encode(message)) == message

    @pytest.mark.parametrize("message", FROM_CLOUD)
    def test_from_the_cloud(self, message: wire.FromCloud) -> None:
        assert wire.decode_from_cloud(wire.encode(message)) == message

    @given(
        st.integers(0, 1 << 40),
        st.lists(st.integers(0, 1 << 31), max_size=50),
        st.binary(max_size=50),
        st.floats(0, 1),
    )
    def test_of_any_question(self, step: int, tokens: list[int], text: bytes, tail: float) -> None:
        ask = wire.Ask(1, step, 0, tokens, -1, text, text, tail, text, text)
        assert wire.decode_from_device(wire.encode(ask)) == ask

    @given(st.lists(st.integers(0, (1 << 32) - 1), max_size=50))
    def test_of_ids(self, ids: list[int]) -> None:
        assert wire.unpack_ids(wire.pack_ids(np.array(ids, np.int64))).tolist() == ids

    @given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
    def test_of_floats(self, values: list[float]) -> None:
        assert wire.unpack_floats(wire.pack_floats(np.array(values, np.float32))).tolist() == values

    def test_is_the_same_on_every_machine(self) -> None:
        assert wire.pack_ids(np.array([1], ">i8")) == b"\x01\x00\x00\x00"
        assert wire.pack_floats(np.array([1.0], ">f8")) == b"\x00\x00\x80\x3f"


class TestNewer:
    @pytest.mark.parametrize("decode", DECODERS)
    def test_messages_are_tolerated(self, decode: Any) -> None:
        assert decode(frame("telepathy", 1, {"any": ["thing"]})) is None
        assert decode(frame("telepathy")) is None

    def test_fields_are_tolerated(self) -> None:
        for message in FROM_DEVICE:
            fields = msgspec.msgpack.decode(wire.encode(message))
            assert wire.decode_from_device(frame(*fields, "new", [1, 2])) == message
        for reply in FROM_CLOUD:
            fields = msgspec.msgpack.decode(wire.encode(reply))
            assert wire.decode_from_cloud(frame(*fields, "new", {"a": 1})) == reply

    def test_fields_that_an_older_side_leaves_out_are_tolerated(self) -> None:
        assert wire.decode_from_device(frame("ask", 1, 2, 3)) == wire.Ask(1, 2, 3)
        assert wire.decode_from_cloud(frame("answer", 1, 2)) == wire.Answer(1, 2)


class TestHostile:
    @pytest.mark.parametrize("decode", DECODERS)
    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"\xc1",
            b"GET / HTTP/1.1\r\n\r\n",
            b'["open", 1]',
            frame(),
            frame(1, 2, 3),
            frame(None),
            frame(["ask"]),
            msgspec.msgpack.encode({"type": "ask", "session": 1}),
            msgspec.msgpack.encode("ask"),
            frame("ask"),
            frame("ask", "one", 2, 3),
            frame("ask", 1, 2, 3, [1.5]),
            frame("ask", 1, 2, 3, [None]),
            frame("open", 1, [{"role": 1, "content": 2}], "", [], "take", 1),
            frame("open", 1, "x", "", [0.0], "steal", 1),
            frame("answer", 1, None),
            frame("hello", "m", "t", "yes", 1),
            b"\x93\xa5close\x01",
            b"\x92\xa5close\xa1\xff",
            b"\x91" * 100_000,
            b"\xdd\xff\xff\xff\xff" + b"\xa3ask",
            b"\xdb\xff\xff\xff\xff",
            b"\x92\xa3ask\xc7\xff\x01",
        ],
    )
    def test_frames_are_protocol_errors(self, decode: Any, raw: bytes) -> None:
        with pytest.raises(ProtocolError):
            decode(raw)

    @pytest.mark.parametrize("decode", DECODERS)
    def test_oversized_frames_are_not_even_read(self, decode: Any) -> None:
        with pytest.raises(ProtocolError, match=str(wire.MAX_FRAME)):
            decode(b"\x00" * (wire.MAX_FRAME + 1))

    def test_the_other_sides_messages_are_errors(self) -> None:
        with pytest.raises(ProtocolError):
            wire.decode_from_device(wire.encode(FROM_CLOUD[0]))
        with pytest.raises(ProtocolError):
            wire.decode_from_cloud(wire.encode(wire.Close(1)))

    @pytest.mark.parametrize("decode", DECODERS)
    @given(raw=st.binary(max_size=200))
    def test_random_bytes(self, decode: Any, raw: bytes) -> None:
        self.read(decode, raw)

    @pytest.mark.parametrize("decode", DECODERS)
    @given(
        tag=st.sampled_from(["open", "ask", "close", "hello", "answer", "more", "refused"]),
        fields=st.lists(
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers(-(1 << 63), (1 << 64) - 1)
                | st.floats()
                | st.text(max_size=9)
                | st.binary(max_size=9),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                max_leaves=5,
            ),
            max_size=12,
        ),
    )
    def test_random_fields(self, decode: Any, tag: str, fields: list[Any]) -> None:
        self.read(decode, frame(tag, *fields))

    @given(at=st.integers(0, 200), byte=st.integers(0, 255), which=st.integers(0, 10))
    def test_one_wrong_byte(self, at: int, byte: int, which: int) -> None:
        message = [*FROM_DEVICE, *FROM_CLOUD][which]
        raw = bytearray(wire.encode(message))
        raw[at % len(raw)] = byte
        for decode in DECODERS:
            self.read(decode, bytes(raw))
            self.read(decode, bytes(raw[: at % len(raw)]))

    @staticmethod
    def read(decode: Any, raw: bytes) -> None:
        try:
            message = decode(raw)
        except ProtocolError:
            return
        assert message is None or isinstance(message, (*wire.FromDevice.__args__, *wire.FromCloud.__args__))

    @pytest.mark.parametrize("unpack", [wire.unpack_ids, wire.unpack_floats])
    @pytest.mark.parametrize("length", [1, 2, 3, 5])
    def test_arrays_that_are_cut_off(self, unpack: Any, length: int) -> None:
        with pytest.raises(ProtocolError, match="cut off"):
            unpack(bytes(length))


@pytest.mark.parametrize(
    ("payload", "masked", "size"),
    [(0, False, 2), (125, False, 127), (126, False, 130), (65_535, True, 65_543), (65_536, True, 65_550)],
)
def test_wire_size_is_rfc_6455s(payload: int, masked: bool, size: int) -> None:
    assert wire.wire_size(payload, masked=masked) == size
