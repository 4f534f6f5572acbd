"""The configuration of `skerry edge`: one struct per section, read by `protocol.config.load`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import platformdirs
from msgspec import Meta

from models.adapter import MOST_RANK
from protocol.errors import ConfigError
from protocol.peers import MAX_HOPS
from protocol.presence import Roster
from protocol.topics import EDGE, LEVEL, Cluster, level
from protocol.transport.base import Transport
from protocol.transport.mqtt import MqttTransport
from server.brokers import Log, Tls, by_cluster, connection
from server.edge.adapter_combine import ChildCombiner
from server.edge.adapter_rounds import AdapterOptions, AdapterRounds
from server.edge.adapter_store import FOLDER, AdapterStore
from server.edge.aggregate import TRIM
from server.edge.bridge import BridgeLimits
from server.edge.collector import SecureCollector
from server.edge.levels import Recipe
from server.edge.round_store import RoundStore
from server.edge.rounds import RoundOptions, Rounds
from server.edge.service import Edge

_FILES = r"^(https?://[^\s/@?#]+(/[^\s?#]*)?)?\Z"
_MEGABYTE = 10**6
_BROKER = r"^mqtts?://(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+)(:[0-9]{1,5})?/?$"


class Place(msgspec.Struct, frozen=True):
    fleet: Annotated[str, Meta(pattern=LEVEL, description="The fleet that the cluster belongs to.")] = "home"
    cluster: Annotated[str, Meta(pattern=LEVEL, description="The cluster that this edge serves.")] = "main"
    hops: Annotated[
        int, Meta(ge=0, le=MAX_HOPS, description="Clusters that a question may cross from here, whatever it asks for.")
    ] = 2
    folder: Annotated[
        str, Meta(description="Where the edge keeps its rounds; empty: in your data folder, by fleet and cluster.")
    ] = ""


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


class RoundsSection(msgspec.Struct, frozen=True):
    enabled: Annotated[bool, Meta(description="Whether the devices' thresholds are averaged here.")] = True
    every: Annotated[float, Meta(ge=1.0, le=31e6, description="Seconds from one round to the next.")] = 3600.0
    collect: Annotated[float, Meta(ge=0.1, le=86_400.0, description="Seconds that a round waits for updates.")] = 120.0
    spread: Annotated[
        float, Meta(ge=0.0, le=86_400.0, description="Seconds over which devices spread their updates.")
    ] = 30.0
    devices: Annotated[
        int, Meta(ge=0, le=1_000_000, description="Devices whose answers end a round early; 0: not by their number.")
    ] = 0
    share: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1.0,
            description="Share of those in the last three rounds whose answers end one early; 0: not by their share.",
        ),
    ] = 1.0
    least: Annotated[int, Meta(ge=1, le=1_000_000, description="Fewest devices that an average rests on.")] = 1
    method: Annotated[
        Literal["mean", "median", "trimmed"],
        Meta(description="Weighted mean, or without weights against devices that lie: median, trimmed mean."),
    ] = "trimmed"
    trim: Annotated[
        float, Meta(ge=0.0, lt=0.5, description="Share of the devices that the trimmed mean cuts off at each end.")
    ] = TRIM
    history: Annotated[
        int, Meta(ge=1, le=10_000, description="Results kept, which `skerry edge rollback` can return to.")
    ] = 50
    secure: Annotated[
        bool, Meta(description="Whether the edge learns sums of devices' updates only, and no single one.")
    ] = False


class AdaptersSection(msgspec.Struct, frozen=True):
    enabled: Annotated[bool, Meta(description="Whether the devices' adapters are aggregated here.")] = False
    every: Annotated[float, Meta(ge=1.0, le=31e6, description="Seconds from one round to the next.")] = 86_400.0
    collect: Annotated[float, Meta(ge=0.5, le=86_400.0, description="Seconds that a round waits for adapters.")] = (
        1800.0
    )
    spread: Annotated[
        float, Meta(ge=0.0, le=86_400.0, description="Seconds over which devices spread their uploads.")
    ] = 60.0
    devices: Annotated[
        int, Meta(ge=0, le=1_000_000, description="Devices whose adapters end a round early; 0: not by their number.")
    ] = 0
    least: Annotated[int, Meta(ge=1, le=1_000_000, description="Fewest devices that an agreed adapter rests on.")] = 1
    strategy: Annotated[
        Literal["flexlora", "flora", "hetlora", "fedsa", "ffa"],
        Meta(
            description="Mean of the changes cut to each rank; all stacked; padded factors; A alone; B alone, A frozen."
        ),
    ] = "flexlora"
    group: Annotated[
        bool, Meta(description="Whether devices that learned different things get adapters of their own.")
    ] = True
    ranks: Annotated[
        list[int], Meta(max_length=8, description="Ranks that adapters are made for, besides the devices' own.")
    ] = msgspec.field(default_factory=list)
    host: Annotated[
        str, Meta(description="Address that files are served on; elsewhere than loopback: put TLS before.")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535, description="Port that files are served on; 0: any free one.")] = 8450
    url: Annotated[
        str, Meta(pattern=_FILES, description="Where devices reach them; empty: http://host:port/v1/adapters.")
    ] = ""
    megabytes: Annotated[int, Meta(ge=1, le=256, description="Most that one adapter may have.")] = 64
    disk_megabytes: Annotated[
        int, Meta(ge=1, le=1 << 24, description="Most that uploads take on disk; as much again for what was agreed.")
    ] = 2000
    memory_megabytes: Annotated[int, Meta(ge=64, le=1 << 24, description="Most memory that aggregating takes.")] = 2000
    history: Annotated[
        int, Meta(ge=1, le=1000, description="Results kept, which `skerry edge rollback --adapters` can return to.")
    ] = 10


class EdgeConfig(msgspec.Struct, frozen=True):
    edge: Place = Place()
    broker: Broker = Broker()
    neighbours: Neighbours = Neighbours()
    rounds: RoundsSection = RoundsSection()
    adapters: AdaptersSection = AdaptersSection()
    tls: Tls = Tls()
    log: Log = Log()


def assemble(config: EdgeConfig) -> Edge:
    """The edge service with its connections, not started. Raises ConfigError, StoreError."""
    cluster = Cluster(config.edge.fleet, config.edge.cluster)
    brokers = by_cluster(config.neighbours.brokers, "neighbours.brokers")
    passwords = by_cluster(config.neighbours.passwords, "neighbours.passwords")
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
    limits = BridgeLimits(hops=config.edge.hops)
    adapters = _adapters(config, cluster)
    return Edge(cluster, home, neighbours, limits, rounds=_rounds(config, cluster), adapters=adapters)


def edge_folder(config: EdgeConfig) -> Path:
    """Where the rounds of this edge are kept."""
    if config.edge.folder:
        return Path(config.edge.folder).expanduser()
    return platformdirs.user_data_path("skerry") / "edge" / f"{config.edge.fleet}.{config.edge.cluster}"


def _rounds(config: EdgeConfig, cluster: Cluster) -> Callable[[Transport, Roster], Rounds] | None:
    """Raises StoreError."""
    section = config.rounds
    if not section.enabled:
        return None
    options = RoundOptions(
        every=section.every,
        collect=section.collect,
        spread=min(section.spread, section.collect / (4 if section.secure else 1)),  # joining is the first half
        devices=section.devices,
        share=section.share,
        least=section.least,
        recipe=Recipe(section.method, section.trim),
        history=section.history,
    )
    store = RoundStore(edge_folder(config))
    return lambda home, roster: Rounds(
        cluster, home, store, options, collector=SecureCollector(cluster, home, roster) if section.secure else None
    )


def _adapters(config: EdgeConfig, cluster: Cluster) -> Callable[[Transport], AdapterRounds] | None:
    """Raises ConfigError, StoreError."""
    section = config.adapters
    if not section.enabled:
        return None
    if not section.url and section.host in ("", "0.0.0.0", "::"):
        raise ConfigError(f"adapters.host = {section.host!r} is no address that devices can reach: set adapters.url")
    if any(not 1 <= rank <= MOST_RANK for rank in section.ranks):
        raise ConfigError(f"adapters.ranks = {section.ranks}: each is 1 to {MOST_RANK}")
    options = AdapterOptions(
        every=section.every,
        collect=section.collect,
        spread=section.spread,
        devices=section.devices,
        least=section.least,
        strategy=section.strategy,
        group=section.group,
        ranks=tuple(section.ranks),
        host=section.host,
        port=section.port,
        url=section.url,
        most_bytes=section.megabytes * _MEGABYTE,
        disk_bytes=section.disk_megabytes * _MEGABYTE,
        memory=section.memory_megabytes * _MEGABYTE,
        history=section.history,
    )
    store = AdapterStore(edge_folder(config) / FOLDER)
    return lambda home: AdapterRounds(cluster, home, store, ChildCombiner(), options)


def _transport(config: EdgeConfig, cluster: Cluster, url: str, user: str, password: str) -> MqttTransport:
    return MqttTransport(connection(url, f"{cluster.fleet}.{cluster.name}.{user}", user, password, config.tls))
