"""Messages of a round of adapters: what is announced over MQTT, while HTTP carries the files (docs/mqtt.md).

    device                            edge of the cluster
                             ←     AdapterCall(round, url, …)        retained
    AdapterOffer(id, bytes)  →                                       devices offer once in each round
    PUT <url>/<id>           →     takes what was offered, no more; its SHA-256 is checked
                                   aggregates
                             ←     AdapterAgreed(number, groups)     retained
    GET <url>/<id>           →     of the own group and rank

The topic proves who offers, and the hash, which nobody but device and edge knows, is the right to upload. Text, tokens
and lessons never travel. `number` and `round` only ever grow, as in protocol/rounds.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from protocol.reading import reader
from protocol.rounds import MAX_NUMBER, Number
from protocol.topics import ADAPTER_AGREED, ADAPTER_CALL, ADAPTER_OFFER

VERSION = 1
MAX_RANK = 4096  # a stack of many devices' adapters
MAX_BYTES = 1 << 32
MAX_LESSONS = 1_000_000  # of one device
MAX_GROUPS = 16
MAX_RANKS = 16
MAX_CENTRE = 8192

SHA256 = r"^[0-9a-f]{64}\Z"
URL = r"^https?://(\[[0-9a-fA-F:.]+\]|[^\s/:@\[\]]+)(:[0-9]{1,5})?(/[^\s?#]*)?\Z"

Id = Annotated[str, Meta(pattern=SHA256)]
Url = Annotated[str, Meta(pattern=URL, max_length=512)]
Size = Annotated[int, Meta(ge=1, le=MAX_BYTES)]
Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]
Strategy = Literal["flexlora", "flora", "hetlora", "fedsa", "ffa"]


class _Message(msgspec.Struct, frozen=True, tag_field="version", tag=VERSION):
    pass


class AdapterCall(_Message, frozen=True):
    """The edge asks every device for its adapter. `seconds`: how long it collects; `url`: below which files are put
    and fetched, each by its SHA-256; `strategy`: "fedsa" takes A matrices alone, "ffa" adapters that all have the same
    A, the others whole adapters; `most_bytes`: of one adapter; `spread`: seconds over which devices spread their
    offers."""

    round: Number
    seconds: Annotated[float, Meta(gt=0.0, le=86_400.0)]
    url: Url
    strategy: Strategy
    most_bytes: Size
    spread: Annotated[float, Meta(ge=0.0, le=86_400.0)] = 0.0


class AdapterOffer(_Message, frozen=True):
    """A device is about to upload its adapter. `base`: number of the AdapterAgreed that it has. `model`: fingerprint of
    the model that the adapter is for; `id`, `bytes`: SHA-256 and size of its file; `lessons`: what it was trained on.
    `share`: "a", if its B matrices stay on the device. `clip`, `noise`: it differs from what was agreed by an L2 norm
    of at most `clip`, and each number has Gaussian noise of standard deviation `noise` * `clip` added; 0: exact."""

    round: Number
    base: Number
    model: Id
    id: Id
    bytes: Size
    rank: Rank
    lessons: Annotated[int, Meta(ge=1, le=MAX_LESSONS)]
    share: Literal["all", "a"] = "all"
    clip: float = 0.0
    noise: float = 0.0


class Blob(msgspec.Struct, frozen=True):
    id: Id
    bytes: Size


class AdapterGroup(msgspec.Struct, frozen=True):
    """Adapters of one model that are alike, as one. `blobs`: by rank. `centre`: mean hidden state of its prompts,
    scaled to int8; empty: unknown."""

    model: Id
    blobs: Annotated[dict[Rank, Blob], Meta(min_length=1, max_length=MAX_RANKS)]
    devices: Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
    lessons: Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
    share: Literal["all", "a"] = "all"
    centre: Annotated[bytes, Meta(max_length=MAX_CENTRE)] = b""


class AdapterAgreed(_Message, frozen=True):
    """The present adapters of a cluster. A lower number than one that was seen before is out of date."""

    number: Number
    round: Number
    url: Url
    groups: Annotated[list[AdapterGroup], Meta(max_length=MAX_GROUPS)] = []


def centre_of(centroid: NDArray[np.float32] | None) -> bytes:
    """(d,) as it travels: int8, the largest being 127."""
    if centroid is None or not 0 < len(centroid) <= MAX_CENTRE or not np.any(centroid):
        return b""
    whole: NDArray[np.int8] = np.rint(centroid * (127.0 / np.abs(centroid).max())).astype(np.int8)
    return whole.tobytes()


def nearest(own: bytes, groups: Sequence[AdapterGroup]) -> AdapterGroup | None:
    """The group whose centre points most the same way as `own` (cosine); where either is unknown, the one of the most
    devices. None: there are no groups."""

    def likeness(group: AdapterGroup) -> tuple[float, int]:
        if not own or len(own) != len(group.centre):
            return (-2.0, group.devices)
        mine, theirs = (np.frombuffer(each, np.int8).astype(np.float64) for each in (own, group.centre))
        lengths = float(np.sqrt((mine * mine).sum() * (theirs * theirs).sum()))
        return (float((mine * theirs).sum()) / max(lengths, 1e-9), group.devices)

    return max(groups, key=likeness, default=None)


def fitting(group: AdapterGroup, rank: int) -> Blob:
    """That of the rank; else of the next one below it, else of the lowest."""
    below = [each for each in group.blobs if each <= rank]
    return group.blobs[max(below) if below else min(group.blobs)]


def encode(message: _Message) -> bytes:
    return _encode(message)


_encode = msgspec.json.Encoder().encode

# Each gives None for a newer version. Raises ProtocolError.
decode_call = reader(ADAPTER_CALL, msgspec.json.Decoder(AdapterCall).decode, VERSION)
decode_offer = reader(ADAPTER_OFFER, msgspec.json.Decoder(AdapterOffer).decode, VERSION)
decode_agreed = reader(ADAPTER_AGREED, msgspec.json.Decoder(AdapterAgreed).decode, VERSION)
