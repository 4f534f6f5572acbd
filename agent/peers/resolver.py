"""The peer resolver: asks a few devices of the cluster, then the edge service, and takes the first good answer.

Questions go to devices by name, so that a question costs the same in a cluster of three and of a thousand, and each
of them answers, if only that it has nothing: when all have, the question has failed at once. Nearly everything that
peers know comes by gossip anyway; a question is for what the gossip missed.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol, TypeAlias

from agent.memory.base import Key
from agent.peers.intake import Intake
from agent.peers.patience import RoundTrip, Worth
from agent.peers.sharing import Sharing
from agent.resolver import Reply, Ticket, Traffic
from protocol.memory import Entry
from protocol.panel import Panel
from protocol.peers import Ask, decode_answer, encode
from protocol.reading import read
from protocol.topics import ANSWER, ASK, EDGE, Cluster
from protocol.transport.base import Delivery, Transport
from protocol.transport.inbox import packet_bytes

log = logging.getLogger(__name__)


class Enough(Enum):
    """Says that the peers know an answer, and that it is not to be used: somebody else is asked (an audit)."""

    ENOUGH = "enough"


ENOUGH: Final = Enough.ENOUGH

Judge: TypeAlias = Callable[[list[Entry]], Reply | Enough | None]

_OPEN = 256  # questions remembered, so that late answers still teach
_FORGET_SECONDS = 2.0  # after which somebody who did not answer is not going to


@dataclass(frozen=True, slots=True)
class Lookup:
    """What is looked for: entries of `space` with a cosine of at least `similarity` to `key` (d,) int8, or the same
    `tail`. `private`: nothing of it may leave this device."""

    space: bytes
    key: Key
    tail: bytes
    similarity: float = 0.0
    private: bool = False


@dataclass(frozen=True, slots=True)
class AskOptions:
    """`at_once`: devices that one question goes to. `floor`: least learned deadline; `cap`: the longest time that a
    question takes, with devices and edge together (seconds). `hops`: clusters that it may be taken to; 0: none."""

    at_once: int = 4
    floor: float = 0.002
    cap: float = 0.05
    hops: int = 1


class Around(Protocol):
    """Who is there, as far as this device knows."""

    def holders(self, space: bytes) -> list[str]:
        """Other devices of the cluster that are online and announced the space."""
        ...

    def reaches(self, space: bytes, hops: int) -> bool:
        """Did the edge announce a device with the space in another cluster, at most so many away?"""
        ...


@dataclass(slots=True, eq=False)
class _Question:
    """A question. `waiting`: who has not answered yet. `over`: nobody waits for it any more."""

    ticket: Ticket
    lookup: Lookup
    judge: Judge
    wake: Callable[[], None]
    traffic: Traffic
    waiting: set[str]
    asked_at: float
    edge: bool  # is to be asked when the others have answered in vain
    over: bool = False


class PeerConversation:
    """One answer being written, as the peers see it."""

    def __init__(self, resolver: PeerResolver, wake: Callable[[], None], traffic: Traffic) -> None:
        self._resolver = resolver
        self._wake = wake
        self._traffic = traffic
        self._tickets: set[Ticket] = set()

    def ask(self, lookup: Lookup, judge: Judge) -> Ticket | None:
        """As `PeerResolver.ask`."""
        ticket = self._resolver.ask(lookup, judge, self._wake, self._traffic)
        if ticket is not None:
            self._tickets = {known for known in self._tickets if known.reply is None and not known.failed} | {ticket}
        return ticket

    def late(self, ticket: Ticket) -> None:
        """The deadline passed."""
        self._tickets.discard(ticket)
        self._resolver.late(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """The draft it was about is gone."""
        self._tickets.discard(ticket)
        self._resolver.withdraw(ticket)

    def close(self) -> None:
        for ticket in self._tickets:
            self._resolver.withdraw(ticket)
        self._tickets.clear()


class PeerResolver:
    """`heard` is called on the transport's thread, all else on the engine's; nothing blocks. `draw`: numbers in
    [0, 1). `new_id`: 64 random bits. `counts`: what came of questions and answers, for metrics."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        transport: Transport,
        around: Around,
        intake: Intake,
        sharing: Sharing,
        clock: Callable[[], float],
        draw: Callable[[], float],
        new_id: Callable[[], int],
        options: AskOptions | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._cluster = cluster
        self._me = me
        self._transport = transport
        self._around = around
        self._intake = intake
        self._sharing = sharing
        self._clock = clock
        self._draw = draw
        self._new_id = new_id
        self._options = options = options or AskOptions()
        self._lock = threading.Lock()  # of what follows
        self._open: OrderedDict[int, _Question] = OrderedDict()
        self._near = RoundTrip(options.floor, options.cap)
        self._far = RoundTrip(options.floor, options.cap)
        self._panel = Panel()
        self._worth: dict[bytes, Worth] = {}

    def open(self, wake: Callable[[], None], traffic: Traffic) -> PeerConversation:
        """`traffic` is what its questions cost."""
        return PeerConversation(self, wake, traffic)

    def ask(self, lookup: Lookup, judge: Judge, wake: Callable[[], None], traffic: Traffic) -> Ticket | None:
        """Asks who may know, and fills the ticket with the first answer of which `judge` makes a Reply; `judge` and
        `wake` are called on the transport's thread. The ticket fails when all have answered in vain, and at once when
        `judge` says ENOUGH. Its deadline moves when it is the edge's turn, to `AskOptions.cap` at most. None: nobody
        is there to ask, or it has not been worth it lately."""
        if lookup.private or lookup.space in self._sharing.unshared:
            return None
        holders = self._around.holders(lookup.space)
        edge = self._around.reaches(lookup.space, self._options.hops)
        if not holders and not edge:
            return None
        now = self._clock()
        with self._lock:
            self._expire(now)
            if not self._worth_of(lookup.space).asking({*holders, *([EDGE] if edge else [])}):
                self.counts["spared"] += 1
                return None
            names = self._panel.choose(holders, self._options.at_once)
            id = self._new_id()
            ticket = Ticket(asked_at=now, deadline=now, step=id)
            question = self._open[id] = _Question(ticket, lookup, judge, wake, traffic, set(), now, edge)
        asked = self._send(question, names) or self._send_edge(question)
        if not asked:  # no connection, as it turns out
            with self._lock:
                self._open.pop(id, None)
            return None
        traffic.asked += 1
        self.counts["asked"] += 1
        return ticket

    def late(self, ticket: Ticket) -> None:
        """Its deadline passed."""
        with self._lock:
            if question := self._drop(ticket):
                self.counts["late"] += 1
                self._worth_of(question.lookup.space).outcome(helped=False)

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody needs it any more."""
        with self._lock:
            self._drop(ticket)

    def _drop(self, ticket: Ticket) -> _Question | None:
        """The question stays known, for what its answers tell of round trips."""
        question = self._open.get(ticket.step)
        if question is None or question.over:
            return None
        question.over = True
        return question

    def heard(self, delivery: Delivery) -> None:
        """An answer, on the topic of answers to this device."""
        sender = self._cluster.sender(delivery.topic)
        if sender is None or delivery.retained:
            self.counts["malformed"] += 1
            return
        answer = read(decode_answer, delivery.payload, self.counts)
        if answer is None:
            return
        with self._lock:
            question = self._open.get(answer.id)
            if question is None or sender not in question.waiting:
                self.counts["unasked"] += 1
                return
            question.waiting.discard(sender)
            (self._far if sender == EDGE else self._near).observe(self._clock() - question.asked_at)
            question.traffic.bytes_down += packet_bytes(delivery.topic, delivery.payload, ANSWER.qos)
        entries = [entry for entry in answer.entries if entry.space == question.lookup.space]
        self._use(question, sender, self._intake.check(sender, entries))

    def _use(self, question: _Question, sender: str, entries: list[Entry]) -> None:
        verdict = self._judge(question, entries) if entries and not question.over else None
        with self._lock:
            self._panel.answered(sender, helped=verdict is not None)
            decided = verdict is not None and not question.over
            exhausted = not question.over and not decided and not question.waiting
            if decided:
                question.over = True
                self.counts["audited" if verdict is ENOUGH else "helped"] += 1
                self._worth_of(question.lookup.space).outcome(helped=True)
        if decided:
            self._decide(question, verdict)
        elif exhausted and not self._send_edge(question):
            self._fail(question)
        # Whoever waits has been woken: now there is time to keep what was heard.
        self._intake.keep(entries)

    def _judge(self, question: _Question, entries: list[Entry]) -> Reply | Enough | None:
        """An answer that cannot be judged is none: the others may have better ones."""
        try:
            return question.judge(entries)
        except Exception as error:
            self.counts["malformed"] += 1
            log.error("%s in judging an answer", type(error).__name__)
            return None

    def _decide(self, question: _Question, verdict: Reply | Enough | None) -> None:
        ticket = question.ticket
        if isinstance(verdict, Reply):
            ticket.replied_at = ticket.heard_at = self._clock()
            ticket.reply = verdict
        else:
            ticket.failed = True
        question.wake()

    def _fail(self, question: _Question) -> None:
        with self._lock:
            if question.over:
                return
            question.over = True
            self.counts["nothing"] += 1
            self._worth_of(question.lookup.space).outcome(helped=False)
        self._decide(question, None)

    def _send_edge(self, question: _Question) -> bool:
        """Once per question, if there is time left."""
        edge, question.edge = question.edge, False
        in_time = self._clock() < question.ticket.asked_at + self._options.cap
        return edge and in_time and self._send(question, [EDGE], self._options.hops)

    def _send(self, question: _Question, names: Sequence[str], hops: int = 0) -> bool:
        """Asks them; whether anybody was asked."""
        lookup, round_trip = question.lookup, self._far if hops else self._near
        message = Ask(
            id=question.ticket.step,
            space=lookup.space,
            key=lookup.key.tobytes(),
            tail=lookup.tail,
            similarity=lookup.similarity,
            hops=hops,
            visited=[self._cluster.name] if hops else [],
        )
        payload = encode(message)
        with self._lock:
            question.waiting = set(names)  # before the first answer can come
            question.asked_at = self._clock()
            last = question.ticket.asked_at + self._options.cap
            question.ticket.deadline = min(question.asked_at + round_trip.deadline, last)
        asked = 0
        for name in names:
            topic = self._cluster.path(ASK, self._me, name)
            sent = self._transport.publish(topic, payload, qos=ASK.qos)
            asked += sent
            with self._lock:
                if sent:
                    question.traffic.bytes_up += packet_bytes(topic, payload, ASK.qos)
                else:
                    question.waiting.discard(name)
        return asked > 0

    def _expire(self, now: float) -> None:
        """Whoever has not answered by now did not hear the question, or does not want to."""
        while self._open:
            oldest = next(iter(self._open.values()))
            if len(self._open) < _OPEN and now - oldest.asked_at < _FORGET_SECONDS:
                return
            for name in oldest.waiting:
                self._panel.silent(name)
            del self._open[oldest.ticket.step]

    def _worth_of(self, space: bytes) -> Worth:
        return self._worth.setdefault(space, Worth(self._draw))
