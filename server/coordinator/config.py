"""The configuration of `skerry coordinator`: one struct per section, read by `protocol.config.load`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import platformdirs
from msgspec import Meta

from protocol.errors import ConfigError
from protocol.rounds import MAX_GROUPS
from protocol.topics import COORDINATOR, LEVEL
from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.brokers import Log, Tls, by_cluster, connection
from server.coordinator.align import AlignOptions
from server.coordinator.service import Coordinator, Link
from server.coordinator.store import StateFile


class Fleet(msgspec.Struct, frozen=True):
    fleet: Annotated[str, Meta(pattern=LEVEL, description="The fleet whose clusters are brought together.")] = "home"
    folder: Annotated[str, Meta(description="Folder of its state; empty: coordinator in the data folder.")] = ""
    pause_s: Annotated[float, Meta(ge=0.01, le=86_400.0, description="Seconds between two publications, at least.")] = (
        5.0
    )
    silence_s: Annotated[
        float,
        Meta(ge=1.0, le=1e9, description="Seconds that a cluster's last report counts while nothing new comes."),
    ] = 259_200.0
    most_share: Annotated[
        float,
        Meta(
            gt=0.0, le=1.0, description="Of the weight of all clusters, what a fifth of them (or one) may have; 1: any."
        ),
    ] = 0.4


class Clusters(msgspec.Struct, frozen=True):
    brokers: Annotated[
        list[str],
        Meta(description="The clusters and where they are reached: A=mqtt://host:1883. Several may share a broker."),
    ] = msgspec.field(default_factory=list)
    passwords: Annotated[list[str], Meta(description="Of the user `coordinator` there: A=password.")] = msgspec.field(
        default_factory=list
    )


class Groups(msgspec.Struct, frozen=True):
    by: Annotated[
        Literal["declared", "similarity"],
        Meta(description="declared: devices belong to their cluster. similarity: also to a group of similar devices."),
    ] = "declared"
    count: Annotated[
        int, Meta(ge=0, le=MAX_GROUPS, description="similarity: how many groups; 0: as many as are found.")
    ] = 0


class CoordinatorConfig(msgspec.Struct, frozen=True):
    coordinator: Fleet = Fleet()
    clusters: Clusters = msgspec.field(default_factory=Clusters)
    groups: Groups = Groups()
    tls: Tls = Tls()
    log: Log = Log()


def state_folder(config: CoordinatorConfig) -> Path:
    named = config.coordinator.folder
    return Path(named).expanduser() if named else platformdirs.user_data_path("skerry") / "coordinator"


def cluster_names(config: CoordinatorConfig) -> list[str]:
    """Raises ConfigError."""
    return list(by_cluster(config.clusters.brokers, "clusters.brokers"))


def assemble(config: CoordinatorConfig) -> Coordinator:
    """The coordinator with its connections, not started. Raises ConfigError, and StoreError for its folder."""
    links = [Link(MqttTransport(options), names) for options, names in _connections(config)]
    own = config.coordinator
    align = AlignOptions(own.most_share, config.groups.by == "similarity", config.groups.count)
    file = StateFile(state_folder(config))
    return Coordinator(own.fleet, links, file, align, pause=own.pause_s, silence=own.silence_s)


def _connections(config: CoordinatorConfig) -> list[tuple[MqttOptions, list[str]]]:
    """One for each broker, with the clusters that are reached there."""
    brokers = by_cluster(config.clusters.brokers, "clusters.brokers")
    passwords = by_cluster(config.clusters.passwords, "clusters.passwords")
    if not brokers:
        raise ConfigError("clusters.brokers: name the clusters and their brokers, such as A=mqtt://host:1883")
    for name in passwords.keys() - brokers.keys():
        raise ConfigError(f"clusters.passwords: {name} is none of clusters.brokers")
    shared: dict[tuple[str, int, bool], list[str]] = {}
    for name, url in brokers.items():
        shared.setdefault(MqttOptions(url, "").address(), []).append(name)
    return [(_options(config, brokers[names[0]], names, passwords), names) for names in shared.values()]


def _options(config: CoordinatorConfig, url: str, names: Sequence[str], passwords: dict[str, str]) -> MqttOptions:
    given = {passwords[name].strip() for name in names if name in passwords}  # a secret file ends with a newline
    if len(given) > 1:
        raise ConfigError(f"clusters.passwords: {', '.join(names)} are at one broker: give one password for it")
    return connection(url, f"{config.coordinator.fleet}.{COORDINATOR}", COORDINATOR, next(iter(given), ""), config.tls)
