"""Messages between devices, and between a device and the edge service (docs/mqtt.md says on which topics).

    asker                                 replier, or `edge`
    Ask(id, space, key, …)          →     to at most a few, by name
                                    ←     Answer(id, entries)        always, with no entries if it has none
    News(entries)                   →     to the whole cluster
                                    ←     Directory(devices)         from the edge, retained

The first element of each message is its version. One of another version, or with more fields, may come from a newer
device: the former is dropped, of the latter the known fields are read. Who sent a message stands in its topic, under
the level that the broker lets only that device write to.
"""

from __future__ import annotations

import math
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from protocol.errors import ProtocolError
from protocol.memory import MAX_KEY_BYTES, ORIGIN_BYTES, SPACE_BYTES, TAIL_BYTES, Entry
from protocol.reading import reader
from protocol.topics import ANSWER, ASK, DIRECTORY, LEVEL, NEWS, is_level

VERSION = 1
MAX_NEWS = 64  # entries
MAX_ANSWER = 8  # entries
MAX_HOPS = 4  # clusters a question may cross, whatever anybody configures
MAX_VISITED = 16  # clusters
MAX_DEVICES = 512  # in a directory

M = TypeVar("M", bound="_Message")
T = TypeVar("T")


class _Message(msgspec.Struct, frozen=True, tag_field="version", tag=VERSION):
    pass


class News(_Message, frozen=True, array_like=True):
    """Entries that the sender has just learned. Hearing them twice has no effect."""

    entries: list[Entry]


class Ask(_Message, frozen=True, array_like=True):
    """Which entries of `space` are at least `similarity` (cosine) near to `key`, or share `tail` with it?

    `id`: 64 random bits, the same wherever the question is passed on to, so that nobody answers it twice. `hops`:
    further clusters that it may be taken to. `visited`: the clusters where it has been asked.
    """

    id: int
    space: bytes
    key: bytes
    tail: bytes
    similarity: float
    hops: int = 0
    visited: list[str] = []


class Answer(_Message, frozen=True, array_like=True):
    """What the replier knows, most similar first, each entry as its origin signed it."""

    id: int
    entries: list[Entry] = []


class Known(msgspec.Struct, frozen=True):
    """A device in a directory. `key`: its public key; `spaces`: those it shares (both in hex). `hops`: how many
    clusters away, 0 for a device of this one."""

    name: Annotated[str, Meta(pattern=LEVEL)]
    cluster: Annotated[str, Meta(pattern=LEVEL)]
    key: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * ORIGIN_BYTES}}}$")]
    spaces: Annotated[list[Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * SPACE_BYTES}}}$")]], Meta(max_length=32)] = []
    hops: Annotated[int, Meta(ge=0, le=MAX_HOPS)] = 0


class Directory(_Message, frozen=True):
    """What the edge of `cluster` knows of: its own devices that are online, and those that neighbours told of."""

    cluster: Annotated[str, Meta(pattern=LEVEL)]
    devices: Annotated[list[Known], Meta(max_length=MAX_DEVICES)] = []


def encode(message: News | Ask | Answer) -> bytes:
    return _pack.encode(message)


def encode_directory(message: Directory) -> bytes:
    return _json.encode(message)


def decode_news(payload: bytes) -> News | None:
    """None for a newer version; the entries are not checked. Raises ProtocolError."""
    news = _news(payload)
    if news is not None and not 1 <= len(news.entries) <= MAX_NEWS:
        raise ProtocolError(f"news of {len(news.entries)} entries; 1 to {MAX_NEWS} are allowed")
    return news


def decode_ask(payload: bytes) -> Ask | None:
    """None for a newer version. Raises ProtocolError."""
    ask = _ask(payload)
    if ask is not None and not (
        _is_id(ask.id)
        and len(ask.space) == SPACE_BYTES
        and len(ask.tail) == TAIL_BYTES
        and 0 < len(ask.key) <= MAX_KEY_BYTES
        and math.isfinite(ask.similarity)
        and -1.0 <= ask.similarity <= 1.0
        and 0 <= ask.hops <= MAX_HOPS
        and len(ask.visited) <= MAX_VISITED
        and all(map(is_level, ask.visited))
    ):
        raise ProtocolError("a question whose fields are out of range")
    return ask


def decode_answer(payload: bytes) -> Answer | None:
    """None for a newer version; the entries are not checked. Raises ProtocolError."""
    answer = _answer(payload)
    if answer is not None and not (_is_id(answer.id) and len(answer.entries) <= MAX_ANSWER):
        raise ProtocolError("an answer whose fields are out of range")
    return answer


def _is_id(id: int) -> bool:
    return 0 <= id < 1 << 64


_pack = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()
_news = reader(NEWS, msgspec.msgpack.Decoder(News).decode, VERSION)
_ask = reader(ASK, msgspec.msgpack.Decoder(Ask).decode, VERSION)
_answer = reader(ANSWER, msgspec.msgpack.Decoder(Answer).decode, VERSION)

decode_directory = reader(DIRECTORY, msgspec.json.Decoder(Directory).decode, VERSION)
"""None for a newer version. Raises ProtocolError."""
