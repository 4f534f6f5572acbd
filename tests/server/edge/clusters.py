"""Clusters with an edge service each, every one on a bus of its own."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from protocol.topics import Cluster
from protocol.transport.base import Delivery
from protocol.transport.bus import Bus, BusTransport
from server.edge.bridge import BridgeLimits
from server.edge.service import Edge
from tests.agent.peers.devices import Device, eventually
from tests.protocol.entries import SPACE


class World:
    """`links`: pairs of clusters, each "AB" for two edges that ask each other. `wire`: all that was published."""

    def __init__(self, folder: Path, clusters: str, links: Iterable[str], limits: BridgeLimits | None = None) -> None:
        self.folder = folder
        self.limits = limits
        self.stack = ExitStack()
        self.buses = {name: Bus() for name in clusters}
        self.wire: dict[str, list[Delivery]] = {name: [] for name in clusters}
        self.links = {name: {pair.replace(name, "") for pair in links if name in pair} for name in clusters}
        self.edges: dict[str, Edge] = {}
        self._numbers = count(1)
        for name, bus in self.buses.items():
            self.stack.callback(bus.close)
            spy = BusTransport(bus, "spy")
            spy.subscribe("#", self.wire[name].append)
            spy.start()
        for name in clusters:
            self.start_edge(name)

    def start_edge(self, name: str) -> Edge:
        neighbours = {other: BusTransport(self.buses[other], f"edge.{name}") for other in sorted(self.links[name])}
        edge = Edge(Cluster("home", name), BusTransport(self.buses[name], "edge"), neighbours, self.limits)
        self.edges[name] = edge
        edge.start()
        self.stack.callback(edge.close)
        return edge

    def device(self, cluster: str, name: str) -> Device:
        place = Cluster("home", cluster)
        return self.stack.enter_context(
            Device(self.folder / cluster, name, next(self._numbers), bus=self.buses[cluster], cluster=place)
        )

    def reachable(self, device: Device, hops: int = 2) -> None:
        """Waits until the device hears that the space can be reached."""
        eventually(lambda: device.network.around.reaches(SPACE, hops))

    def settle(self) -> None:
        for _ in range(4):
            for bus in self.buses.values():
                bus.settle()

    def topics(self, cluster: str, part: str) -> list[str]:
        return [delivery.topic for delivery in self.wire[cluster] if part in delivery.topic]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
