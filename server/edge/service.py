"""The edge service of one cluster: a directory of who is there and within reach, a bridge for questions, and rounds of
thresholds and of adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from protocol.errors import ConfigError
from protocol.presence import Roster
from protocol.topics import ANSWER, ASK, DIRECTORY, EDGE, Cluster
from protocol.transport.base import Transport
from server.edge.adapter_rounds import AdapterRounds
from server.edge.bridge import Bridge, BridgeLimits
from server.edge.directory import Listing
from server.edge.rounds import Rounds


class Edge:
    """`home`: to the cluster's own broker, as device `edge`. `neighbours`: to theirs, by cluster, as device
    `edge.<this cluster>`. None of the transports must be started yet: `start` does that, and `close` ends them. Each
    of the brokers may be gone for a while; what can be reached without it still is. `rounds`, `adapters`: make them at
    `home`; None: there are none."""

    def __init__(
        self,
        cluster: Cluster,
        home: Transport,
        neighbours: Mapping[str, Transport],
        limits: BridgeLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        rounds: Callable[[Transport, Roster], Rounds] | None = None,
        adapters: Callable[[Transport], AdapterRounds] | None = None,
    ) -> None:
        limits = limits or BridgeLimits()
        if cluster.name in neighbours:
            raise ConfigError(f"cluster {cluster.name!r} cannot be a neighbour of itself: name another one")
        self.cluster = cluster
        self.home = home
        self.neighbours = neighbours
        self.listing = Listing(cluster, home, limits.hops)
        self.roster = Roster(cluster, self.listing.member)
        self.bridge = Bridge(cluster, home, neighbours, self.roster, self.listing, clock, limits)
        self.rounds = rounds(home, self.roster) if rounds else None
        self.adapters = adapters(home) if adapters else None
        self._federations = [each for each in (self.rounds, self.adapters) if each is not None]
        home.will, home.on_up = self.listing.will, self._up
        self.roster.watch(home)
        home.subscribe(cluster.path(DIRECTORY, EDGE), self.listing.retained, qos=DIRECTORY.qos)
        home.subscribe(cluster.path(ASK, other=EDGE), self.bridge.asked, qos=ASK.qos)
        home.subscribe(cluster.path(ANSWER, other=EDGE), partial(self.bridge.answered, cluster.name), qos=ANSWER.qos)
        for name, transport in neighbours.items():
            there = Cluster(cluster.fleet, name)
            answers = there.path(ANSWER, EDGE, f"{EDGE}.{cluster.name}")
            transport.subscribe(there.path(DIRECTORY, EDGE), partial(self.listing.heard, name), qos=DIRECTORY.qos)
            transport.subscribe(answers, partial(self.bridge.answered, name), qos=ANSWER.qos)
            transport.on_down = partial(self.listing.lost, name)
        home.on_down = self._down

    def start(self) -> None:
        """Begins to connect to all brokers. Raises ConfigError if it cannot listen for the devices' adapters."""
        self.listing.start()
        for each in self._federations:
            each.start()
        for transport in (self.home, *self.neighbours.values()):
            transport.start()

    def close(self) -> None:
        self.listing.close()
        for transport in (self.home, *self.neighbours.values()):
            transport.close()
        for each in self._federations:
            each.close()

    def _up(self) -> None:
        self.listing.refresh()
        for each in self._federations:
            each.up()

    def _down(self) -> None:
        for each in self._federations:
            each.down()
