"""The answering side and the asking side, with messages that nobody honest sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.memory.memory import EntryMemory
from agent.peers.answer import Answerer, AnswerLimits
from agent.peers.sharing import Sharing
from protocol.memory import check_entry
from protocol.peers import MAX_ANSWER, Answer, Ask, News, decode_answer, encode
from protocol.topics import ANSWER, ASK, Cluster
from protocol.transport.base import Delivery, Transport
from protocol.transport.bus import Bus
from tests.agent.peers.devices import Device, acquainted
from tests.protocol.entries import SPACE, TAIL, entry, key_of, someone

A = Cluster("home", "A")
ME = someone(1)
FAR_TAIL = b"\0" * 8


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Sent(Transport):
    """Keeps what is published."""

    connected = True
    state = "connected"

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, bytes]] = []

    def publish(self, topic: str, payload: bytes, **options: Any) -> bool:
        self.sent.append((topic, payload))
        return True

    def start(self) -> None: ...

    def subscribe(self, filter: str, handler: Callable[[Delivery], None], *, qos: int = 0) -> None: ...

    def close(self) -> None: ...


class Desk:
    def __init__(self, folder: Path, limits: AnswerLimits | None = None) -> None:
        self.clock = Clock()
        self.memory = EntryMemory(folder)
        self.out = Sent()
        sharing = Sharing(unshared=frozenset([b"unshared........"]))
        self.answerer = Answerer(A, "me", self.out, self.memory, sharing, ME.public, ME.sign, self.clock, limits)

    def hear(self, payload: bytes, asker: str = "lamp", *, retained: bool = False) -> None:
        self.answerer.heard(Delivery(A.path(ASK, asker, "me"), payload, retained))

    def told(self, ask: Ask, asker: str = "lamp") -> Answer | None:
        """The answer, if there is one."""
        before = len(self.out.sent)
        self.hear(encode(ask), asker)
        if len(self.out.sent) == before:
            return None
        topic, payload = self.out.sent[-1]
        assert topic == A.path(ANSWER, "me", asker)
        return decode_answer(payload)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.memory.close()


def question(number: int, id: int = 1, *, similarity: float = 0.9, tail: bytes = FAR_TAIL, space: bytes = SPACE) -> Ask:
    return Ask(id, space, key_of(number).tobytes(), tail, similarity)


class TestAnswers:
    def test_hold_what_is_near_enough_as_it_was_signed(self, desk: Desk) -> None:
        theirs = [entry(someone(2), number) for number in range(5)]
        desk.memory.add(theirs)
        answer = desk.told(question(3))
        assert answer == Answer(1, [theirs[3]])
        assert desk.told(question(99)) == Answer(1, [])

    def test_hold_the_same_last_tokens_however_far_the_key(self, desk: Desk) -> None:
        desk.memory.add([entry(ME, 3, tail=TAIL)])
        answer = desk.told(question(4, tail=TAIL))
        assert answer is not None
        assert len(answer.entries) == 1

    def test_hold_few_entries_however_many_are_near(self, desk: Desk) -> None:
        desk.memory.add([entry(ME, 3, token=token) for token in range(50)])
        answer = desk.told(question(3, similarity=-1.0))
        assert answer is not None
        assert len(answer.entries) == MAX_ANSWER
        assert all(check_entry(one) is None for one in answer.entries)

    def test_never_hold_what_lies_in_a_space_that_is_not_shared(self, desk: Desk) -> None:
        desk.memory.add([entry(ME, 3, space=b"unshared........")])
        assert desk.told(question(3, space=b"unshared........")) == Answer(1, [])

    def test_keys_of_another_width_find_nothing(self, desk: Desk) -> None:
        desk.memory.add([entry(ME, 3)])
        assert desk.told(msgspec.structs.replace(question(3), key=b"short")) == Answer(1, [])
        assert desk.told(msgspec.structs.replace(question(3), key=bytes(32))) == Answer(1, [])

    def test_a_question_by_two_ways_is_answered_once(self, desk: Desk) -> None:
        assert desk.told(question(1, id=5), "edge.B") is not None
        assert desk.told(question(1, id=5), "edge.C") is None
        assert desk.answerer.counts["duplicate"] == 1

    def test_a_device_that_takes_anothers_id_silences_nobody(self, desk: Desk) -> None:
        assert desk.told(question(1, id=5), "lamp") is not None
        assert desk.told(question(1, id=5), "fridge") is not None


class TestLimits:
    def test_one_asker_cannot_take_all(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path, AnswerLimits(asker_rate=1, asker_burst=5, rate=100, burst=100))
        answers = [desk.told(question(1, id=id)) for id in range(20)]
        assert sum(answer is not None for answer in answers) == 5
        assert desk.told(question(1), "fridge") is not None
        assert desk.answerer.counts["flood"] == 15
        desk.clock.now += 2
        assert desk.told(question(1)) is not None
        desk.memory.close()

    def test_nor_can_many(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path, AnswerLimits(asker_rate=10, asker_burst=10, rate=1, burst=30))
        answers = [desk.told(question(1), f"device-{number}") for number in range(100)]
        assert sum(answer is not None for answer in answers) == 30
        desk.memory.close()


class TestHostileQuestions:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(payload=st.binary(max_size=300))
    def test_rubbish_is_counted_and_not_answered(self, desk: Desk, payload: bytes) -> None:
        desk.clock.now += 1000
        before = desk.answerer.counts["malformed"] + desk.answerer.counts["version"]
        desk.hear(payload)
        assert desk.answerer.counts["malformed"] + desk.answerer.counts["version"] == before + 1
        assert desk.out.sent == []

    def test_neither_are_retained_ones_and_those_for_somebody_else(self, desk: Desk) -> None:
        desk.hear(encode(question(1)), retained=True)
        desk.answerer.heard(Delivery(A.path(ASK, "lamp", "fridge"), encode(question(1)), False))
        desk.answerer.heard(Delivery("skerry/1/home/B/lamp/memory/ask/me", encode(question(1)), False))
        desk.hear(encode(question(1)), asker="+")
        assert desk.out.sent == []
        assert desk.answerer.counts == {"malformed": 4}

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        ask=st.builds(
            Ask,
            id=st.integers(0, 2**64 - 1),
            space=st.just(SPACE) | st.binary(min_size=16, max_size=16),
            key=st.binary(min_size=1, max_size=64),
            tail=st.binary(min_size=8, max_size=8),
            similarity=st.floats(-1, 1),
            hops=st.integers(0, 4),
            visited=st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True), max_size=5),
        )
    )
    def test_every_question_in_order_gets_an_answer(self, desk: Desk, ask: Ask) -> None:
        desk.clock.now += 1000
        answer = desk.told(ask)
        assert answer is not None
        assert answer.id == ask.id


class TestHostileAnswers:
    """Of a device that was asked, and of others."""

    @pytest.fixture
    def pair(self, tmp_path: Path) -> Iterator[tuple[Device, Device]]:
        bus = Bus()
        with Device(tmp_path, "lamp", 1, bus=bus) as lamp, Device(tmp_path, "fridge", 2, bus=bus) as fridge:
            acquainted(lamp, fridge)
            bus.fault = lambda client, delivery: [] if "/memory/ask/" in delivery.topic else [delivery]
            yield lamp, fridge
        bus.close()

    @staticmethod
    def answer(lamp: Device, payload: bytes, sender: str = "fridge") -> None:
        lamp.network.resolver.heard(Delivery(A.path(ANSWER, sender, "lamp"), payload, False))

    def test_forged_entries_answer_nothing(self, pair: tuple[Device, Device]) -> None:
        lamp, fridge = pair
        forged = [
            msgspec.structs.replace(entry(fridge.who, 1), token=8),
            entry(someone(9), 1),
            entry(fridge.who, 1, space=b"another space..."),
            msgspec.structs.replace(entry(fridge.who, 1), p=7.0),
        ]
        ticket = lamp.ask(1)
        assert ticket is not None
        self.answer(lamp, encode(Answer(ticket.step, forged)))
        assert ticket.failed
        assert ticket.reply is None
        lamp.memory.flush()
        assert lamp.memory.stats().entries == 0

    def test_only_whoever_was_asked_may_answer_and_once(self, pair: tuple[Device, Device]) -> None:
        lamp, fridge = pair
        ticket = lamp.ask(1)
        assert ticket is not None
        good = encode(Answer(ticket.step, [entry(fridge.who, 1)]))
        self.answer(lamp, good, "mallory")
        self.answer(lamp, encode(Answer(ticket.step ^ 1, [entry(fridge.who, 1)])))
        assert ticket.reply is None
        self.answer(lamp, good)
        assert ticket.reply is not None
        self.answer(lamp, good)
        assert lamp.network.resolver.counts == {"asked": 1, "helped": 1, "unasked": 3}

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
    @given(data=st.binary(max_size=300), where=st.integers(0, 1000), bit=st.integers(0, 7))
    def test_rubbish_answers_nothing(self, pair: tuple[Device, Device], data: bytes, where: int, bit: int) -> None:
        lamp, fridge = pair
        resolver = lamp.network.resolver
        resolver._worth.clear()
        ticket = lamp.ask(1)
        assert ticket is not None
        genuine = encode(Answer(ticket.step, [entry(fridge.who, 1)]))
        broken = bytearray(genuine)
        broken[where % len(broken)] ^= 1 << bit
        self.answer(lamp, data)
        self.answer(lamp, bytes(broken))
        assert ticket.reply is None
        resolver.withdraw(ticket)

    def test_questions_without_answers_are_forgotten(self, pair: tuple[Device, Device]) -> None:
        lamp, _ = pair
        for _ in range(600):
            lamp.network.resolver._worth.clear()
            lamp.network.resolver._panel.answered("fridge", helped=True)
            lamp.ask(1)
        assert len(lamp.network.resolver._open) <= 256

    def test_a_whole_devices_handlers_survive_all_topics(self, pair: tuple[Device, Device]) -> None:
        lamp, fridge = pair
        network = lamp.network
        handlers: Sequence[tuple[Callable[[Delivery], None], str]] = [
            (network.intake.news, "skerry/1/home/A/fridge/memory/new"),
            (network.answerer.heard, "skerry/1/home/A/fridge/memory/ask/lamp"),
            (network.resolver.heard, "skerry/1/home/A/fridge/memory/answer/lamp"),
            (network.around.roster.take, "skerry/1/home/A/fridge/status"),
            (network.around.directory, "skerry/1/home/A/edge/directory"),
        ]
        messages = [b"", b"\xc1", b"{", bytes(300_000), b"\x91" * 5000, encode(News([entry(fridge.who, 1)]))]
        messages += [encode(question(1)), encode(Answer(3, [])), msgspec.msgpack.encode([2]), b'{"version": 2}']
        for handler, topic in handlers:
            for message in messages:
                for retained in (False, True):
                    handler(Delivery(topic, message, retained))
        assert lamp.memory.stats().entries == 1
