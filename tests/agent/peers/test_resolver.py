"""One question among peers: how long it may take, what its judge may say, and when it is over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest

from agent.peers.resolver import ENOUGH, AskOptions, Judge, Lookup, PeerResolver
from agent.peers.sharing import Sharing
from agent.resolver import Ticket, Traffic
from protocol.memory import Entry
from protocol.peers import Answer, decode_ask, encode
from protocol.topics import ANSWER, EDGE, Cluster
from protocol.transport.base import Delivery, Handler, Transport
from tests.agent.peers.devices import reply_of
from tests.protocol.entries import SPACE, TAIL, entry, key_of, someone

A = Cluster("home", "A")
LAMP = someone(1)
CAP = 0.05


class Wire(Transport):
    """Takes everything, and says what was taken."""

    connected = True
    state = "connected"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []  # whom, and the question's id

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, done: Callable[[], None] | None = None
    ) -> bool:
        ask = decode_ask(payload)
        assert ask is not None
        self.asked.append((topic.rpartition("/")[2], ask.id))
        return True

    def start(self) -> None: ...

    def close(self) -> None: ...

    def subscribe(self, filter: str, handler: Handler, *, qos: int = 0) -> None: ...


class Nearby:
    """Two devices here, and the edge knows more."""

    names = ("fridge", "door")

    def holders(self, space: bytes) -> list[str]:
        return list(self.names)

    def reaches(self, space: bytes, hops: int) -> bool:
        return True


class Desk:
    """A resolver with everything around it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.wire = Wire()
        self.around = Nearby()
        self.kept: list[Entry] = []
        self.woken = 0
        self.resolver = PeerResolver(
            A,
            "me",
            self.wire,
            self.around,
            self,  # type: ignore[arg-type]
            Sharing(),
            lambda: self.now,
            lambda: 0.0,
            itertools.count(1).__next__,
            AskOptions(cap=CAP),
        )

    def check(self, sender: str, entries: Sequence[Entry]) -> list[Entry]:
        return list(entries)

    def keep(self, entries: Sequence[Entry]) -> None:
        self.kept.extend(entries)

    def wake(self) -> None:
        self.woken += 1

    def ask(self, judge: Judge = reply_of) -> Ticket:
        ticket = self.resolver.ask(Lookup(SPACE, key_of(1), TAIL), judge, self.wake, Traffic())
        assert ticket is not None
        return ticket

    def hear(self, sender: str, *entries: Entry) -> None:
        """An answer to the latest question."""
        payload = encode(Answer(self.wire.asked[-1][1], list(entries)))
        self.resolver.heard(Delivery(A.path(ANSWER, sender, "me"), payload, retained=False))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.wire.asked]


@pytest.fixture
def desk() -> Iterator[Desk]:
    return Desk()


def failing(entries: list[Entry]) -> None:
    raise ValueError("keys of another width")


class TestJudges:
    def test_one_that_fails_is_no_answer_and_the_others_count(self, desk: Desk) -> None:
        bad, good = entry(LAMP, 1, token=1), entry(LAMP, 1, token=2)
        ticket = desk.ask(lambda entries: failing(entries) if entries == [bad] else reply_of(entries))
        desk.hear("fridge", bad)
        assert ticket.reply is None
        desk.hear("door", good)
        assert ticket.reply is not None
        assert ticket.reply.tokens == [2]
        assert desk.resolver.counts["malformed"] == 1

    def test_one_that_always_fails_leaves_nobody_waiting(self, desk: Desk) -> None:
        ticket = desk.ask(failing)
        for sender in ("fridge", "door", EDGE):
            assert not ticket.failed
            desk.hear(sender, entry(LAMP, 1))
        assert ticket.failed
        assert desk.woken == 1

    def test_enough_ends_the_question_without_a_reply(self, desk: Desk) -> None:
        ticket = desk.ask(lambda entries: ENOUGH)
        desk.hear("fridge", entry(LAMP, 1))
        assert ticket.failed
        assert ticket.reply is None
        assert desk.woken == 1
        desk.hear("door", entry(LAMP, 1))
        assert ticket.reply is None
        assert desk.woken == 1
        assert EDGE not in desk.names
        assert desk.resolver.counts == {"asked": 1, "audited": 1}
        assert len(desk.kept) == 2


class TestTime:
    def test_devices_and_edge_share_one_budget(self, desk: Desk) -> None:
        ticket = desk.ask()
        assert ticket.deadline == 100.0 + CAP
        desk.now += 0.03
        desk.hear("fridge")
        desk.hear("door")
        assert desk.names[-1] == EDGE
        assert ticket.deadline == 100.0 + CAP

    def test_the_edges_turn_is_as_short_as_its_answers_were(self, desk: Desk) -> None:
        desk.around.names = ()
        for _ in range(50):
            desk.ask()
            desk.now += 0.004
            desk.hear(EDGE)
        ticket = desk.ask()
        assert desk.now + 0.004 < ticket.deadline < desk.now + 0.01

    def test_when_the_time_is_up_the_edge_is_not_asked(self, desk: Desk) -> None:
        ticket = desk.ask()
        desk.now += CAP
        desk.hear("fridge")
        desk.hear("door")
        assert EDGE not in desk.names
        assert ticket.failed
