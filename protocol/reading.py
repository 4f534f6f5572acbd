"""How a message is read, whoever sent it: nothing of a newer version, an error for what is malformed or too large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import msgspec

from protocol.errors import ProtocolError
from protocol.topics import Topic

T = TypeVar("T")

_BROKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Head(msgspec.Struct, frozen=True):
    version: int


class _PackedHead(msgspec.Struct, frozen=True, array_like=True):
    version: int


def reader(kind: Topic, decode: Callable[[bytes], T], version: int) -> Callable[[bytes], T | None]:
    """Reads messages of a topic with `decode`, a msgspec decoder's. What it returns gives None for a version above
    `version`, and raises ProtocolError."""
    head: Callable[[bytes], _Head | _PackedHead] = (
        msgspec.json.Decoder(_Head).decode if kind.encoding == "JSON" else msgspec.msgpack.Decoder(_PackedHead).decode
    )

    def read(payload: bytes) -> T | None:
        if len(payload) > kind.limit:
            raise ProtocolError(f"a message of {len(payload)} bytes is over the limit of {kind.limit}")
        try:
            return decode(payload)
        except _BROKEN as error:
            if newer(payload):
                return None
            raise ProtocolError(f"malformed message: {error}") from None

    def newer(payload: bytes) -> bool:
        try:
            return head(payload).version > version
        except _BROKEN:
            return False

    return read


def read(decode: Callable[[bytes], T | None], payload: bytes, counts: Counter[str]) -> T | None:
    """The message; None if it is malformed or of a newer version, which is counted as `malformed` or `version`."""
    try:
        message = decode(payload)
    except ProtocolError:
        counts["malformed"] += 1
        return None
    if message is None:
        counts["version"] += 1
    return message
