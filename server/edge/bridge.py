"""Questions from cluster to cluster.

    device of A ──Ask──► edge of A ──Ask──► edge of B ──Ask──► devices of B, at most a few
                                                     └─Ask──► edge of C, if `hops` are left and nobody in B knew

Answers go back the same way, the first good one as soon as it is there. Three things keep a question from going round:
`hops` count down; `visited` names the clusters that were asked or are being asked; and nobody takes up an `id` twice.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from protocol.limits import Bucket, Buckets
from protocol.memory import Entry, check_entry
from protocol.panel import Panel
from protocol.peers import MAX_ANSWER, MAX_VISITED, Answer, Ask, decode_answer, decode_ask, encode
from protocol.presence import Roster
from protocol.reading import read
from protocol.topics import ANSWER, ASK, EDGE, Cluster, is_edge
from protocol.transport.base import Delivery, Transport
from server.edge.directory import Listing

_AT_ONCE = 4  # devices, or neighbours, that one question goes to
_FORGET_SECONDS = 2.0  # after which no answer is waited for any more
_OPEN = 1024
_SEEN = 8192  # ids


@dataclass(frozen=True, slots=True)
class BridgeLimits:
    """`hops`: clusters a question may still cross, whatever it says. Questions per second, and at once: of one device,
    of one neighbour, and of all."""

    hops: int = 2
    device_rate: float = 20.0
    device_burst: int = 100
    neighbour_rate: float = 100.0
    neighbour_burst: int = 400
    rate: float = 500.0
    burst: int = 1000


@dataclass(slots=True, eq=False)
class _Pending:
    """A question on its way. `waiting`: cluster and name of who has not answered. `here`, `beyond`: is to be asked
    next in this cluster, then in others."""

    asker: str
    ask: Ask
    at: float
    waiting: set[tuple[str, str]]
    here: bool
    beyond: bool


class Bridge:
    """Its methods are called on the threads of several transports. `neighbours`: transports to their brokers, by
    cluster. `counts`: what became of questions and answers."""

    def __init__(
        self,
        cluster: Cluster,
        home: Transport,
        neighbours: Mapping[str, Transport],
        roster: Roster,
        listing: Listing,
        clock: Callable[[], float],
        limits: BridgeLimits,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._home = cluster
        self._name_abroad = f"{EDGE}.{cluster.name}"
        self._clusters = {name: Cluster(cluster.fleet, name) for name in (cluster.name, *neighbours)}
        self._transports = {cluster.name: home, **neighbours}
        self._roster = roster
        self._listing = listing
        self._clock = clock
        self._limits = limits
        self._lock = threading.RLock()  # of what follows
        self._panel = Panel()
        self._devices = Buckets(limits.device_rate, limits.device_burst, clock)
        self._edges = Buckets(limits.neighbour_rate, limits.neighbour_burst, clock)
        self._all = Bucket(limits.rate, limits.burst, clock)
        self._open: OrderedDict[int, _Pending] = OrderedDict()
        self._seen: OrderedDict[int, None] = OrderedDict()

    def asked(self, delivery: Delivery) -> None:
        """A question to the edge, from a device of this cluster or a neighbour's edge."""
        asker = self._home.sender(delivery.topic)
        with self._lock:
            ask = self._admitted(asker, delivery)
            if ask is None or asker is None:
                return
            now = self._clock()
            self._expire(now)
            if ask.id in self._seen:
                self.counts["repeated"] += 1
                self._answer(asker, ask, [])
                return
            self._seen[ask.id] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            self.counts["asked"] += 1
            # A device has asked those around it by itself.
            pending = _Pending(asker, ask, now, set(), here=is_edge(asker), beyond=ask.hops > 0)
            self._open[ask.id] = pending
            self._advance(pending)

    def _admitted(self, asker: str | None, delivery: Delivery) -> Ask | None:
        """The question with its hops limited, or None and a count of why not."""
        if asker is None or delivery.retained or delivery.topic != self._home.path(ASK, asker, EDGE):
            self.counts["malformed"] += 1
            return None
        buckets = self._edges if is_edge(asker) else self._devices
        if not buckets.take(asker) or not self._all.take():
            self.counts["flood"] += 1
            return None
        ask = read(decode_ask, delivery.payload, self.counts)
        if ask is None:
            return None
        return msgspec.structs.replace(ask, hops=min(ask.hops, self._limits.hops))

    def answered(self, cluster: str, delivery: Delivery) -> None:
        """An answer to the edge, heard in `cluster`: from a device in its own, from the edge in another one."""
        sender = self._clusters[cluster].sender(delivery.topic)
        answer = read(decode_answer, delivery.payload, self.counts)
        if answer is None:
            return
        with self._lock:
            pending = self._open.get(answer.id)
            if sender is None or pending is None or (cluster, sender) not in pending.waiting:
                self.counts["unasked"] += 1
                return
            pending.waiting.discard((cluster, sender))
        good = [
            entry for entry in answer.entries if self._good(entry, pending.ask)
        ]  # not under the lock: it takes time
        with self._lock:
            if cluster == self._home.name:
                self._panel.answered(sender, helped=bool(good))
            if answer.id not in self._open:
                return  # somebody else was faster
            if good:
                self.counts["helped"] += 1
                self._finish(pending, good)
            elif not pending.waiting:
                self._advance(pending)

    def _good(self, entry: Entry, ask: Ask) -> bool:
        genuine = entry.space == ask.space and self._listing.knows(entry.origin) and check_entry(entry) is None
        if not genuine:
            self.counts["bad_entry"] += 1
        return genuine

    def _advance(self, pending: _Pending) -> None:
        """Asks the next ones, or gives up."""
        if pending.here:
            pending.here = False
            self._ask_here(pending)
        if not pending.waiting and pending.beyond:
            pending.beyond = False
            self._ask_beyond(pending)
        if not pending.waiting:
            self._finish(pending, [])

    def _ask_here(self, pending: _Pending) -> None:
        space = pending.ask.space
        names = [seen.name for seen in self._roster.online() if space in seen.spaces and not is_edge(seen.name)]
        asked = msgspec.structs.replace(pending.ask, hops=0, visited=[])
        for name in self._panel.choose(sorted(names), _AT_ONCE):
            self._send(pending, self._home.name, EDGE, name, asked)

    def _ask_beyond(self, pending: _Pending) -> None:
        ask = pending.ask
        been = {*ask.visited, self._home.name}
        routes = sorted(self._listing.routes(ask.space, ask.hops - 1, been))[:_AT_ONCE]
        visited = sorted(been | set(routes))
        if len(visited) > MAX_VISITED:
            return
        asked = msgspec.structs.replace(ask, hops=ask.hops - 1, visited=visited)
        for neighbour in routes:
            self._send(pending, neighbour, self._name_abroad, EDGE, asked)

    def _send(self, pending: _Pending, cluster: str, me: str, name: str, ask: Ask) -> None:
        topic = self._clusters[cluster].path(ASK, me, name)
        pending.waiting.add((cluster, name))
        if self._transports[cluster].publish(topic, encode(ask), qos=ASK.qos):
            self.counts["passed_on"] += 1
        else:
            pending.waiting.discard((cluster, name))

    def _finish(self, pending: _Pending, entries: list[Entry]) -> None:
        del self._open[pending.ask.id]
        self._answer(pending.asker, pending.ask, entries)

    def _answer(self, asker: str, ask: Ask, entries: list[Entry]) -> None:
        topic = self._home.path(ANSWER, EDGE, asker)
        payload = encode(Answer(ask.id, entries[:MAX_ANSWER]))
        self._transports[self._home.name].publish(topic, payload, qos=ANSWER.qos)

    def _expire(self, now: float) -> None:
        while self._open:
            id, oldest = next(iter(self._open.items()))
            if len(self._open) < _OPEN and now - oldest.at < _FORGET_SECONDS:
                return
            for cluster, name in oldest.waiting:
                if cluster == self._home.name:
                    self._panel.silent(name)
            self.counts["expired"] += 1
            del self._open[id]
