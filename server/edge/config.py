"""The configuration of `skerry edge`: one struct per section, read by `protocol.config.load`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.errors import ConfigError
from protocol.peers import MAX_HOPS
from protocol.topics import EDGE, LEVEL, Cluster, level
from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.edge.bridge import BridgeLimits
from server.edge.service import Edge

_BROKER = r"^mqtts?://(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+)(:[0-9]{1,5})?/?$"


class Place(msgspec.Struct, frozen=True):
    fleet: Annotated[str, Meta(pattern=LEVEL, description="The fleet that the cluster belongs to.")] = "home"
    cluster: Annotated[str, Meta(pattern=LEVEL, description="The cluster that this edge serves.")] = "main"
    hops: Annotated[
        int, Meta(ge=0, le=MAX_HOPS, description="Clusters that a question may cross from here, whatever it asks for.")
    ] = 2


class Broker(msgspec.Struct, frozen=True):
    url: Annotated[str, Meta(pattern=_BROKER, description="The cluster's own MQTT broker.")] = "mqtt://127.0.0.1:1883"
    password: Annotated[str, Meta(description="Of the user `edge` there; empty: the broker needs none.")] = ""


class Neighbours(msgspec.Struct, frozen=True):
    brokers: Annotated[list[str], Meta(description="Neighbouring clusters and their brokers: B=mqtt://host:1883.")] = (
        msgspec.field(default_factory=list)
    )
    passwords: Annotated[list[str], Meta(description="Of the user `edge.<this cluster>` there: B=password.")] = (
        msgspec.field(default_factory=list)
    )


class Tls(msgspec.Struct, frozen=True):
    ca: Annotated[str, Meta(description="File of the authority that signed the brokers' certificates.")] = ""
    certificate: Annotated[str, Meta(description="File of the edge's certificate for the brokers.")] = ""
    key: Annotated[str, Meta(description="File of that certificate's private key.")] = ""


class Log(msgspec.Struct, frozen=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="Least severe messages logged. Keys and tokens never are."),
    ] = "info"


class EdgeConfig(msgspec.Struct, frozen=True):
    edge: Place = Place()
    broker: Broker = Broker()
    neighbours: Neighbours = Neighbours()
    tls: Tls = Tls()
    log: Log = Log()


def assemble(config: EdgeConfig) -> Edge:
    """The edge service with its connections, not started. Raises ConfigError."""
    cluster = Cluster(config.edge.fleet, config.edge.cluster)
    brokers = _by_cluster(config.neighbours.brokers, "neighbours.brokers")
    passwords = _by_cluster(config.neighbours.passwords, "neighbours.passwords")
    for name in passwords.keys() - brokers.keys():
        raise ConfigError(f"neighbours.passwords: {name} is none of neighbours.brokers")
    if cluster.name in brokers:
        raise ConfigError(f"neighbours.brokers: cluster {cluster.name!r} is this edge's own; name the others")
    home = _transport(config, cluster, config.broker.url, EDGE, config.broker.password)
    abroad = level(f"{EDGE}.{cluster.name}", "the edge's name at its neighbours,")
    neighbours = {
        name: _transport(config, Cluster(cluster.fleet, name), url, abroad, passwords.get(name, ""))
        for name, url in brokers.items()
    }
    return Edge(cluster, home, neighbours, BridgeLimits(hops=config.edge.hops))


def _transport(config: EdgeConfig, cluster: Cluster, url: str, user: str, password: str) -> MqttTransport:
    options = MqttOptions(
        url=url,
        client_id=f"{cluster.fleet}.{cluster.name}.{user}",
        username=user if password else "",
        password=password.strip(),  # a secret file ends with a newline
        ca=config.tls.ca,
        certificate=config.tls.certificate,
        key=config.tls.key,
    )
    return MqttTransport(options)


def _by_cluster(pairs: Sequence[str], key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not value or name in found:
            raise ConfigError(f"{key}: each is CLUSTER=VALUE, and names a cluster of its own; {name!r} does not")
        Cluster("fleet", name)  # raises ConfigError for what can't be part of a topic
        found[name] = value
    return found
