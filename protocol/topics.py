"""Every MQTT topic, in one table (docs/mqtt.md shows it; a test compares the two).

`skerry/1/<fleet>/<cluster>/<device>/...`: a device publishes under its own level and nowhere else, so one broker rule
(`pattern write skerry/1/+/+/%u/#`) makes the level a proof of who sent a message. The device names `edge` and
`edge.<cluster>` belong to edge services: `edge` to the cluster's own, `edge.B` to cluster B's where it asks here; the
name `coordinator` belongs to the fleet's coordinator.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from protocol.errors import ConfigError

ROOT = "skerry/1"
EDGE = "edge"
COORDINATOR = "coordinator"
LEVEL = r"^[A-Za-z0-9_.-]{1,64}$"

_LEVEL = re.compile(LEVEL)


class Topic(NamedTuple):
    """One kind of topic. `suffix` follows the sender's level; `{other}` is the device that it is meant for. `limit`:
    bytes of the largest payload; what is larger is dropped unread."""

    suffix: str
    sender: str
    receiver: str
    message: str
    encoding: Literal["JSON", "MessagePack"]
    qos: int
    retained: bool
    limit: int
    meaning: str

    @property
    def pattern(self) -> str:
        return f"{ROOT}/<fleet>/<cluster>/<device>/{self.suffix.format(other='<other>')}"


STATUS = Topic(
    suffix="status",
    sender="device",
    receiver="devices and edge of the cluster",
    message="Status",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=8 << 10,
    meaning="The device is there, or (its will) gone: key, spaces, session number.",
)
NEWS = Topic(
    suffix="memory/new",
    sender="device",
    receiver="devices of the cluster",
    message="News",
    encoding="MessagePack",
    qos=1,
    retained=False,
    limit=256 << 10,
    meaning="Entries that the device has just learned, signed by it.",
)
ASK = Topic(
    suffix="memory/ask/{other}",
    sender="device or edge",
    receiver="device `<other>`, or the edge",
    message="Ask",
    encoding="MessagePack",
    qos=0,
    retained=False,
    limit=16 << 10,
    meaning="Has `<other>` entries like this one? The edge asks on in its cluster or in others.",
)
ANSWER = Topic(
    suffix="memory/answer/{other}",
    sender="device or edge",
    receiver="device `<other>`, who asked",
    message="Answer",
    encoding="MessagePack",
    qos=0,
    retained=False,
    limit=96 << 10,
    meaning="The entries, signed by whoever learned them; none: it has nothing.",
)
DIRECTORY = Topic(
    suffix="directory",
    sender="edge",
    receiver="devices of the cluster, neighbouring edges",
    message="Directory",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=256 << 10,
    meaning="The devices here and within reach: keys, spaces, distance.",
)

CALL = Topic(
    suffix="round",
    sender="edge",
    receiver="devices of the cluster",
    message="Call",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=4 << 10,
    meaning="A round began: every device sends its update, once.",
)
UPDATE = Topic(
    suffix="round/update",
    sender="device",
    receiver="the edge",
    message="Update",
    encoding="JSON",
    qos=1,
    retained=False,
    limit=4 << 10,
    meaning="What the device learned by itself: a threshold and counts.",
)
SECURE = Topic(
    suffix="round/secure/{other}",
    sender="device or edge",
    receiver="the edge, or device `<other>`",
    message="Secure",
    encoding="JSON",
    qos=1,
    retained=False,
    limit=64 << 10,
    meaning="The steps of a round whose edge learns the sum alone.",
)
AGREED = Topic(
    suffix="policy",
    sender="edge",
    receiver="devices of the cluster",
    message="Agreed",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=64 << 10,
    meaning="What the cluster and the fleet have learned about when to ask.",
)
REPORT = Topic(
    suffix="report",
    sender="edge",
    receiver="the coordinator",
    message="Report",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=256 << 10,
    meaning="The cluster's aggregates, for those of the fleet.",
)
OVERALL = Topic(
    suffix="overall",
    sender="coordinator",
    receiver="edge of the cluster",
    message="Overall",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=64 << 10,
    meaning="What all clusters of the fleet have learned together.",
)

ADAPTER_CALL = Topic(
    suffix="adapters/round",
    sender="edge",
    receiver="devices of the cluster",
    message="AdapterCall",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=4 << 10,
    meaning="A round of adapters began: every device offers its own, once.",
)
ADAPTER_OFFER = Topic(
    suffix="adapters/offer",
    sender="device",
    receiver="the edge",
    message="AdapterOffer",
    encoding="JSON",
    qos=1,
    retained=False,
    limit=4 << 10,
    meaning="Hash and size of the adapter that the device is about to upload.",
)
ADAPTER_AGREED = Topic(
    suffix="adapters/agreed",
    sender="edge",
    receiver="devices of the cluster",
    message="AdapterAgreed",
    encoding="JSON",
    qos=1,
    retained=True,
    limit=256 << 10,
    meaning="The cluster's adapters: hashes and sizes, by group and rank.",
)

TABLE = (
    STATUS,
    NEWS,
    ASK,
    ANSWER,
    DIRECTORY,
    CALL,
    UPDATE,
    SECURE,
    AGREED,
    REPORT,
    OVERALL,
    ADAPTER_CALL,
    ADAPTER_OFFER,
    ADAPTER_AGREED,
)


def level(name: str, what: str) -> str:
    """`name`, if it can be one level of a topic. Raises ConfigError, which calls it `what`."""
    if not _LEVEL.fullmatch(name):
        raise ConfigError(f"{what} {name!r} cannot be part of a topic: 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    return name


def is_level(name: str) -> bool:
    return _LEVEL.fullmatch(name) is not None


def is_edge(device: str) -> bool:
    return device == EDGE or device.startswith(EDGE + ".")


def device_name(name: str) -> str:
    """`name`, if a device may be called that. Raises ConfigError."""
    if is_edge(level(name, "the device name")) or name == COORDINATOR:
        raise ConfigError(f"the device name {name!r} is reserved for the services: choose another one")
    return name


@dataclass(frozen=True, slots=True)
class Cluster:
    """The topics of one cluster."""

    fleet: str
    name: str

    def __post_init__(self) -> None:
        level(self.fleet, "the fleet")
        level(self.name, "the cluster")

    def path(self, kind: Topic, device: str = "+", other: str = "+") -> str:
        """The topic, or with + the filter of the topics, that `device` publishes to (for `other`)."""
        return f"{ROOT}/{self.fleet}/{self.name}/{device}/{kind.suffix.format(other=other)}"

    def sender(self, topic: str) -> str | None:
        """The device whose level the topic is under; None if it is no topic of this cluster."""
        prefix = f"{ROOT}/{self.fleet}/{self.name}/"
        if not topic.startswith(prefix):
            return None
        device = topic[len(prefix) :].partition("/")[0]
        return device if is_level(device) else None
