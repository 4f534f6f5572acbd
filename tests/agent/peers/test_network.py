"""Devices on a bus: what one learns the others know, by gossip or because they ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from agent.peers.intake import Verdict
from agent.peers.resolver import AskOptions, Lookup
from agent.peers.sharing import Sharing
from agent.resolver import Traffic
from protocol.memory import sign_entry
from protocol.peers import Ask, News, encode
from protocol.presence import status
from protocol.topics import ASK, NEWS, STATUS
from protocol.transport.base import Delivery
from protocol.transport.bus import Bus, BusTransport
from tests.agent.peers.devices import A, Device, acquainted, eventually, reply_of
from tests.protocol.entries import SPACE, TAIL, WIDTH, entry, key_of, someone

OTHER = b"another space..."
Make = Callable[..., Device]


@pytest.fixture
def bus() -> Iterator[Bus]:
    bus = Bus()
    yield bus
    bus.close()


@pytest.fixture
def make(bus: Bus, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:
        numbers = iter(range(1, 100))
        yield lambda name, **options: stack.enter_context(Device(tmp_path, name, next(numbers), bus=bus, **options))


@pytest.fixture
def wire(bus: Bus) -> list[Delivery]:
    """Everything that is published, as the broker's administrator would see it."""
    heard: list[Delivery] = []
    spy = BusTransport(bus, "spy")
    spy.subscribe("#", heard.append)
    spy.start()
    bus.settle()
    return heard


def topics(wire: list[Delivery], part: str) -> list[str]:
    return [delivery.topic for delivery in wire if part in delivery.topic]


class TestGossip:
    def test_what_one_learns_the_others_know(self, make: Make) -> None:
        lamp, fridge, door = make("lamp"), make("fridge"), make("door")
        acquainted(lamp, fridge, door)
        lamp.learn(1)
        eventually(lambda: fridge.knows(1) and door.knows(1))
        fridge.learn(2)
        eventually(lambda: lamp.knows(2) and door.knows(2))
        assert lamp.network.intake.counts["accepted"] == 1

    def test_many_entries_go_in_few_messages(self, make: Make, wire: list[Delivery]) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        for number in range(100):
            lamp.learn(number)
        eventually(lambda: fridge.network.intake.counts["accepted"] == 100)
        assert len(topics(wire, "/memory/new")) <= 20

    def test_nothing_is_said_where_nobody_shares_the_space(self, make: Make, wire: list[Delivery], bus: Bus) -> None:
        lamp, fridge = make("lamp"), make("fridge", spaces=[OTHER])
        eventually(lambda: bool(lamp.network.around.holders(OTHER)))
        lamp.learn(1)
        lamp.network.gossip.close()
        bus.settle()
        assert not topics(wire, "/memory/new")
        assert not fridge.knows(1)

    def test_who_is_away_hears_of_it_when_it_is_back(self, make: Make, bus: Bus) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        bus.cut("fridge")
        eventually(lambda: not lamp.sees(fridge))
        lamp.learn(1)
        eventually(lambda: lamp.network.outbox.sent == 1)
        bus.restore("fridge")
        eventually(lambda: fridge.knows(1))

    def test_what_is_learned_offline_is_told_later(self, make: Make, bus: Bus) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        bus.stop()
        bus.settle()
        lamp.learn(1)
        eventually(lambda: lamp.network.gossip.sent == 1)
        bus.start(persistence=False)
        eventually(lambda: fridge.knows(1))

    def test_duplicates_and_another_order_change_nothing(self, make: Make, bus: Bus) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        kept: list[Delivery] = []

        def twice_and_late(client: str, delivery: Delivery) -> list[Delivery]:
            if client != "fridge" or "/memory/new" not in delivery.topic:
                return [delivery]
            kept.insert(0, delivery)
            return [*kept, *kept]

        bus.fault = twice_and_late
        for number in range(40):
            lamp.learn(number)
        eventually(lambda: all(map(fridge.knows, range(40))))
        eventually(lambda: fridge.network.intake.counts["duplicate"] > 0)
        assert fridge.memory.stats().entries == 40
        assert fridge.transport.handler_errors == 0


class TestUnwelcome:
    def test_entries_that_the_model_cannot_use_take_no_room(self, make: Make) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        for width in range(6200, 6220):
            made = msgspec.structs.replace(entry(fridge.who), key=b"k" * width)
            fridge.network.gossip.share(sign_entry(made, fridge.who.sign))
        fridge.learn(1)
        eventually(lambda: lamp.knows(1))
        eventually(lambda: lamp.network.intake.counts[Verdict.ACCEPTED] == 1)
        assert lamp.network.intake.counts[Verdict.ABSURD] == 20
        assert [space.width for space in lamp.memory.stats().spaces] == [WIDTH]

    def test_a_quarantined_device_does_not_come_back_under_a_new_key(self, make: Make, bus: Bus) -> None:
        lamp, evil = make("lamp"), make("evil")
        acquainted(lamp, evil)
        while not lamp.trust.note(evil.who.public, wrong=True):
            pass
        fresh = someone(99)
        evil.transport.publish(A.path(STATUS, "evil"), status(1 << 20, True, fresh.public, [SPACE]), qos=1, retain=True)
        evil.transport.publish(A.path(NEWS, "evil"), encode(News([entry(fresh, 1)])), qos=1)
        bus.settle()
        assert lamp.network.around.roster.unbelieved >= 1
        assert lamp.network.around.key_of("evil") == evil.who.public
        assert lamp.memory.stats().entries == 0


class TestKeptAtHome:
    """Nothing of these may ever be on the wire."""

    def test_private_entries_and_questions(self, make: Make, wire: list[Delivery], bus: Bus) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        secret = lamp.learn(1, private=True)
        assert lamp.ask(2, private=True) is None
        lamp.learn(3)
        eventually(lambda: fridge.knows(3))
        bus.settle()
        assert not topics(wire, "/memory/ask/")
        assert not any(secret.key in delivery.payload for delivery in wire)

    @pytest.mark.parametrize("sharing", [Sharing(enabled=False), Sharing(unshared=frozenset([SPACE]))])
    def test_a_device_or_a_space_that_is_not_shared(
        self, make: Make, wire: list[Delivery], bus: Bus, sharing: Sharing
    ) -> None:
        quiet, fridge = make("quiet", sharing=sharing), make("fridge")
        eventually(lambda: quiet.sees(fridge))
        secret = quiet.learn(1)
        assert not fridge.sees(quiet)
        asker = A.path(ASK, "fridge", "quiet")
        question = encode(Ask(1, SPACE, secret.key, secret.tail, 0.5))
        fridge.transport.publish(asker, question)
        eventually(lambda: quiet.network.answerer.counts["nothing"] == 1)
        bus.settle()
        quiet.network.gossip.close()
        assert not topics(wire, "/memory/new")
        assert not any(secret.key in delivery.payload for delivery in wire if delivery.topic != asker)

    def test_no_questions_about_an_unshared_space(self, make: Make) -> None:
        quiet, fridge = make("quiet", sharing=Sharing(unshared=frozenset([SPACE]))), make("fridge")
        eventually(lambda: quiet.sees(fridge))
        assert quiet.ask(1) is None


class TestAsking:
    def test_what_a_peer_knows_answers_at_once(self, make: Make) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        fridge.memory.add([entry(fridge.who, 1, token=42)])
        acquainted(lamp, fridge)
        reply = lamp.told(1)
        assert reply is not None
        assert reply.tokens == [42]
        assert lamp.woken.is_set()
        eventually(lambda: lamp.knows(1))  # and is not asked again

    def test_entries_are_passed_on_with_their_origins_signature(self, make: Make) -> None:
        lamp, fridge, door = make("lamp"), make("fridge"), make("door")
        acquainted(lamp, fridge, door)
        fridge.memory.add([entry(door.who, 1, token=42)])
        heard: list[bytes] = []
        assert lamp.told(1, lambda entries: heard.extend(one.origin for one in entries)) is None  # type: ignore[func-returns-value]
        assert heard == [door.who.public]

    def test_own_entries_that_were_never_sent_are_signed_then(self, make: Make) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        fridge.memory.learn(entry(fridge.who, 1, token=42, signed=False))
        acquainted(lamp, fridge)
        reply = lamp.told(1)
        assert reply is not None
        assert reply.tokens == [42]

    def test_when_all_have_answered_in_vain_nobody_waits(self, make: Make) -> None:
        lamp, fridge, door = make("lamp"), make("fridge"), make("door")
        acquainted(lamp, fridge, door)
        fridge.memory.add([entry(fridge.who, 1)])
        assert lamp.told(2) is None
        assert lamp.network.resolver.counts == {"asked": 1, "nothing": 1}

    def test_the_first_acceptable_answer_wins(self, make: Make) -> None:
        lamp, fridge, door = make("lamp"), make("fridge"), make("door")
        acquainted(lamp, fridge, door)
        fridge.memory.add([entry(fridge.who, 1, token=1)])
        door.memory.add([entry(door.who, 1, token=2)])
        reply = lamp.told(1, lambda entries: reply_of(entries) if entries[0].token == 2 else None)
        assert reply is not None
        assert reply.tokens == [2]

    def test_only_what_is_near_enough_is_sent(self, make: Make) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        fridge.memory.add([entry(fridge.who, number) for number in range(20)])
        lengths: list[int] = []
        lamp.told(1, lambda entries: lengths.append(len(entries)))  # type: ignore[func-returns-value]
        assert lengths == [1]

    def test_alone_or_where_nobody_has_the_space_nobody_is_asked(self, make: Make, wire: list[Delivery]) -> None:
        lamp = make("lamp")
        assert lamp.ask(1) is None
        make("fridge", spaces=[OTHER])
        eventually(lambda: bool(lamp.network.around.holders(OTHER)))
        assert lamp.ask(1) is None
        assert not topics(wire, "/memory/ask/")

    def test_without_a_connection_nobody_is_asked(self, make: Make, bus: Bus) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        bus.cut("lamp")
        eventually(lambda: not lamp.transport.connected)
        assert lamp.ask(1) is None

    def test_of_many_devices_a_few_are_asked(self, make: Make, wire: list[Delivery], bus: Bus) -> None:
        devices = [make(f"device-{number}") for number in range(12)]
        acquainted(*devices)
        assert devices[0].told(1) is None
        bus.settle()
        assert len(topics(wire, "/memory/ask/")) == len(topics(wire, "/memory/answer/")) == 4

    def test_traffic_is_counted_as_packets_are_sized(self, make: Make, bus: Bus) -> None:
        lamp, fridge = make("lamp"), make("fridge")
        acquainted(lamp, fridge)
        fridge.memory.add([entry(fridge.who, 1)])
        bus.settle()
        assert isinstance(lamp.transport, BusTransport)
        before = lamp.transport.bytes_up, lamp.transport.bytes_down
        traffic = Traffic()
        ticket = lamp.network.resolver.ask(Lookup(SPACE, key_of(1), TAIL, 0.9), reply_of, lambda: None, traffic)
        eventually(lambda: ticket is not None and ticket.reply is not None)
        after = lamp.transport.bytes_up, lamp.transport.bytes_down
        assert (traffic.bytes_up, traffic.bytes_down) == (after[0] - before[0], after[1] - before[1])
        assert traffic.bytes_up > 0
        assert traffic.asked == 1

    def test_a_late_or_withdrawn_question_takes_no_answer(self, make: Make, bus: Bus) -> None:
        lamp, fridge = make("lamp", asking=AskOptions(cap=0.0, floor=0.0)), make("fridge")
        acquainted(lamp, fridge)
        fridge.memory.add([entry(fridge.who, 1)])
        for give_up in (lamp.network.resolver.late, lamp.network.resolver.withdraw):
            held: list[Delivery] = []
            bus.fault = lambda client, delivery, held=held: (  # type: ignore[misc]
                held.append(delivery) or [] if "/memory/answer/" in delivery.topic else [delivery]
            )
            ticket = lamp.ask(1)
            assert ticket is not None
            eventually(lambda held=held: bool(held))  # type: ignore[misc]
            give_up(ticket)
            bus.fault = lambda client, delivery: [delivery]
            lamp.network.resolver.heard(held[0])
            assert ticket.reply is None
            assert not ticket.failed
        assert lamp.network.resolver.counts["late"] == 1
