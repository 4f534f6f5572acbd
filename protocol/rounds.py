"""Messages of a round: one federated aggregation (docs/mqtt.md says on which topics).

    device                       edge of the cluster                       coordinator
                        ←     Call(round, …)             retained
    Update(round, …)    →                                                  devices answer each round once
                        ←     Agreed(number, subjects)   retained
                              Report(number, subjects)   retained    →
                                                         retained    ←     Overall(number, subjects)

Thresholds are averaged only with those of the same *subject*: the same measure of uncertainty, model and goal. What
travels is a threshold and counts, never text, tokens or hidden states. `number` and `round` only ever grow; whoever
lost its own goes on above what it hears from the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.reading import reader
from protocol.topics import AGREED, CALL, OVERALL, REPORT, UPDATE

VERSION = 1
MAX_NUMBER = 1 << 53  # what every JSON reader can hold exactly
MAX_JUMP = 1 << 40  # what one message may add to a number that has to grow
MAX_SUBJECTS = 32
MAX_GROUPS = 16
MAX_SAMPLE = 256  # devices in a report
STATISTICS = ("mean_u", "mean_beta", "slope")  # what devices are told apart by: slope is beta's on u

Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Evidence = Annotated[float, Meta(ge=0.0, le=1e12)]
Subject = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
_Statistics = Annotated[list[float], Meta(min_length=len(STATISTICS), max_length=len(STATISTICS))]


def subject(measure: str, model: str, goal: str) -> str:
    """The id of what a threshold is about. `model`: the SLM's fingerprint; `goal`: as `agent.learn.goals` names it."""
    return hashlib.sha256("\0".join((measure, model, goal)).encode()).hexdigest()[:16]


class _Message(msgspec.Struct, frozen=True, tag_field="version", tag=VERSION):
    pass


class Call(_Message, frozen=True):
    """The edge asks every device for its update. `seconds`: how long it collects; `spread`: seconds over which devices
    spread their updates, so that they do not all come at once. `secure`: masked sums are collected instead
    (protocol/secure.py)."""

    round: Number
    seconds: Annotated[float, Meta(gt=0.0, le=86_400.0)]
    spread: Annotated[float, Meta(ge=0.0, le=86_400.0)] = 0.0
    secure: bool = False


class Update(_Message, frozen=True):
    """What a device learned by itself. Its values are judged by the edge, which has a reason for each refusal.

    `base`: number of the Agreed that it has. `evidence`: how many escalations and audits the threshold rests on
    (effective number: weights count). `statistics`: as STATISTICS; None if the device does not tell. `clip`, `noise`:
    the threshold differs from what was agreed by at most `clip`, and has Gaussian noise of standard deviation
    `noise` * `clip` added; 0: it is exact.
    """

    round: Number
    base: Number
    subject: Subject
    threshold: float
    evidence: float
    statistics: _Statistics | None = None
    clip: float = 0.0
    noise: float = 0.0


class Level(msgspec.Struct, frozen=True):
    """An aggregate. `evidence`: summed over those who took part."""

    threshold: Share
    evidence: Evidence
    devices: Annotated[int, Meta(ge=0, le=MAX_NUMBER)]


class Group(Level, frozen=True):
    """Of the devices whose statistics are nearest to `centre`."""

    centre: _Statistics = msgspec.field(default_factory=lambda: [0.0] * len(STATISTICS))


class Whole(msgspec.Struct, frozen=True):
    """All clusters of the fleet together. `groups`: the coordinator's, if devices are assigned by similarity; `scale`:
    what distances are divided by."""

    level: Level
    groups: Annotated[list[Group], Meta(max_length=MAX_GROUPS)] = []
    scale: _Statistics | None = None


class Learned(msgspec.Struct, frozen=True):
    """What was agreed of one subject: in this cluster, and in all. None: nobody knows yet."""

    cluster: Level | None = None
    overall: Whole | None = None


class Agreed(_Message, frozen=True):
    """The present state of a cluster. A lower number than one that was seen before is out of date."""

    number: Number
    round: Number
    subjects: Annotated[dict[Subject, Learned], Meta(max_length=MAX_SUBJECTS)] = {}


class Told(msgspec.Struct, frozen=True):
    """What an edge tells the coordinator of one subject. `groups`: aggregates of the groups of `Overall` number
    `overall`, in its order. `sample`: statistics of some devices, without their names."""

    level: Level
    overall: Number = 0
    groups: Annotated[list[Level], Meta(max_length=MAX_GROUPS)] = []
    sample: Annotated[list[_Statistics], Meta(max_length=MAX_SAMPLE)] = []


class Report(_Message, frozen=True):
    number: Number
    subjects: Annotated[dict[Subject, Told], Meta(max_length=MAX_SUBJECTS)] = {}


class Overall(_Message, frozen=True):
    number: Number
    subjects: Annotated[dict[Subject, Whole], Meta(max_length=MAX_SUBJECTS)] = {}


def nearest(statistics: Sequence[float], whole: Whole) -> int | None:
    """The place in `whole.groups` of the group that a device with these statistics belongs to. None: no groups."""
    scale = whole.scale or [1.0] * len(STATISTICS)

    def distance(group: Group) -> float:
        pairs = zip(statistics, group.centre, scale, strict=True)
        return math.hypot(*((own - centre) / max(unit, 1e-9) for own, centre, unit in pairs))

    return min(range(len(whole.groups)), key=lambda at: distance(whole.groups[at]), default=None)


def encode(message: _Message) -> bytes:
    return _encode(message)


_encode = msgspec.json.Encoder().encode

# Each gives None for a newer version. Raises ProtocolError.
decode_call = reader(CALL, msgspec.json.Decoder(Call).decode, VERSION)
decode_update = reader(UPDATE, msgspec.json.Decoder(Update).decode, VERSION)
decode_agreed = reader(AGREED, msgspec.json.Decoder(Agreed).decode, VERSION)
decode_report = reader(REPORT, msgspec.json.Decoder(Report).decode, VERSION)
decode_overall = reader(OVERALL, msgspec.json.Decoder(Overall).decode, VERSION)
