"""What every Transport must do (protocol/transport/base.py): MQTT over both brokers, and the bus."""

from __future__ import annotations

import threading

import pytest

from protocol.transport.base import Delivery, Transport, Will
from tests.protocol.transport.worlds import PATIENCE, Inbox, World, wait_until


def publish(transport: Transport, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
    """Waits until the broker has it."""
    done = threading.Event()
    assert transport.publish(topic, payload, qos=qos, retain=retain, done=done.set)
    assert done.wait(PATIENCE)


def ready(world: World, id: str, filter: str, qos: int = 1) -> tuple[Transport, Inbox]:
    """A connected client whose subscription the broker has."""
    transport, inbox, sign = world.client(id), Inbox(), Inbox()
    transport.subscribe(filter, inbox, qos=qos)
    transport.subscribe(f"sign/{id}", sign, qos=1)
    world.connect(transport)
    publish(transport, f"sign/{id}", b"")
    sign.wait(1)
    return transport, inbox


@pytest.mark.parametrize("qos", [0, 1])
def test_a_message_reaches_whoever_subscribed(world: World, qos: int) -> None:
    _, inbox = ready(world, "b", "a/+/c", qos)
    _, other = ready(world, "c", "a/b", qos)
    a = world.up("a")
    publish(a, "a/b/d", b"no", qos=qos)
    publish(a, "a/b/c", b"\0yes", qos=qos)
    assert inbox.wait(1) == [Delivery("a/b/c", b"\0yes", False)]
    assert other.got == []


def test_retained_messages_meet_late_subscribers(world: World) -> None:
    a = world.up("a")
    publish(a, "state/a", b"old", retain=True)
    publish(a, "state/a", b"new", retain=True)
    publish(a, "state/gone", b"x", retain=True)
    publish(a, "state/gone", b"", retain=True)
    b, inbox = world.up("b"), Inbox()
    b.subscribe("state/#", inbox, qos=1)
    assert inbox.wait(1) == [Delivery("state/a", b"new", True)]
    publish(a, "state/a", b"newest", retain=True)
    assert inbox.wait(2)[1] == Delivery("state/a", b"newest", False)


@pytest.mark.parametrize("qos", [0, 1])
def test_messages_of_one_publisher_arrive_in_order(world: World, qos: int) -> None:
    _, inbox = ready(world, "b", "t", qos)
    a = world.up("a")
    sent = [b"%d" % i for i in range(300)]
    for payload in sent:
        assert a.publish("t", payload, qos=qos)
    inbox.wait(300)
    assert inbox.payloads == sent


def test_each_handler_gets_it_once_though_several_filters_match(world: World) -> None:
    b, wide, narrow, same, end = world.client("b"), Inbox(), Inbox(), Inbox(), Inbox()
    for filter, handler in (("t/#", wide), ("t/+", narrow), ("t/+", same), ("end", end)):
        b.subscribe(filter, handler, qos=1)
    world.connect(b)
    publish(b, "t/1", b"x")
    publish(b, "end", b"")
    end.wait(1)
    assert [inbox.payloads for inbox in (wide, narrow, same)] == [[b"x"]] * 3


def test_what_was_missed_at_qos_1_comes_when_the_connection_is_back(world: World) -> None:
    b, inbox = ready(world, "b", "t")
    a = world.up("a")
    world.cut("b")
    wait_until(lambda: not b.connected)
    for i in range(50):
        publish(a, "t", b"%d" % i)
    world.restore("b")
    got = inbox.wait_for(lambda: b"49" in inbox.payloads)
    assert list(dict.fromkeys(inbox.payloads)) == [b"%d" % i for i in range(50)]
    assert not any(delivery.retained for delivery in got)


def test_a_closed_clients_session_waits_for_its_return(world: World) -> None:
    b, _ = ready(world, "b", "t")
    b.close()
    a = world.up("a")
    publish(a, "t", b"while away")
    again, inbox = world.client("b"), Inbox()
    again.subscribe("t", inbox, qos=1)
    world.connect(again)
    assert inbox.wait(1) == [Delivery("t", b"while away", False)]


def test_nothing_is_lost_when_the_subscriber_is_cut_under_load(world: World) -> None:
    _, inbox = ready(world, "b", "t")
    a = world.up("a")
    sent = 0
    for _ in range(4):
        for _ in range(50):
            publish(a, "t", b"%d" % sent)
            sent += 1
        world.cut("b")
        for _ in range(20):
            publish(a, "t", b"%d" % sent)
            sent += 1
        world.restore("b")
    inbox.wait_for(lambda: len(set(inbox.payloads)) >= sent)
    first = [int(payload) for payload in dict.fromkeys(inbox.payloads)]
    assert first == sorted(first)


def test_the_will_comes_if_the_connection_breaks_and_not_if_it_is_closed(world: World) -> None:
    _, inbox = ready(world, "watch", "will/+")
    world.up("a", will=lambda: Will("will/a", b"gone"))
    b = world.up("b", will=lambda: Will("will/b", b"gone"))
    b.close()
    world.cut("a")
    assert inbox.wait(1) == [Delivery("will/a", b"gone", False)]
    late = Inbox()
    world.up("late").subscribe("will/+", late, qos=1)
    assert late.wait(1) == [Delivery("will/a", b"gone", True)]
    assert inbox.payloads == [b"gone"]


def test_the_will_is_asked_for_before_each_connection(world: World) -> None:
    _, inbox = ready(world, "watch", "will/a")
    number = iter(range(1, 100))
    last = [0]

    def will() -> Will:
        last[0] = next(number)
        return Will("will/a", b"%d" % last[0])

    a = world.up("a", will=will)
    first = last[0]
    world.cut("a")
    inbox.wait(1)
    wait_until(lambda: not a.connected)
    world.restore("a")
    wait_until(lambda: a.connected)
    second = last[0]
    world.cut("a")
    inbox.wait(2)
    assert inbox.payloads == [b"%d" % first, b"%d" % second]
    assert second > first


def test_up_comes_before_messages_and_down_after_each_loss(world: World) -> None:
    events: list[str] = []
    changed = Inbox()

    def note(event: str) -> None:
        events.append(event)
        changed(Delivery(event, b"", False))

    publish(world.up("a"), "t", b"kept", retain=True)
    b = world.client("b", on_up=lambda: note("up"), on_down=lambda: note("down"))
    b.subscribe("t", lambda delivery: note("message"), qos=1)
    b.start()
    changed.wait_for(lambda: events[:2] == ["up", "message"])
    world.cut("b")
    changed.wait_for(lambda: "down" in events)
    assert not b.connected
    assert not b.publish("t", b"")
    world.restore("b")
    changed.wait_for(lambda: events.count("message") >= 2)
    assert [event for event in events if event != "message"] == ["up", "down", "up"]
    assert events[events.index("down") + 1] == "up"


def test_after_a_restart_without_memory_everybody_is_subscribed_again(world: World) -> None:
    b, inbox = ready(world, "b", "t")
    a = world.up("a")
    world.stop()
    wait_until(lambda: not a.connected and not b.connected)
    world.start(persistence=False)
    wait_until(lambda: a.connected and b.connected)
    wait_until(lambda: a.publish("t", b"x", qos=1) and b"x" in inbox.payloads)


def test_a_restart_with_memory_keeps_sessions_and_retained_messages(lasting: World) -> None:
    b, _ = ready(lasting, "b", "t")
    a = lasting.up("a")
    publish(a, "state", b"kept", retain=True)
    b.close()
    for i in range(20):
        publish(a, "t", b"%d" % i)
    lasting.stop()
    wait_until(lambda: not a.connected)
    lasting.start(persistence=True)
    again, inbox, state = lasting.client("b"), Inbox(), Inbox()
    again.subscribe("t", inbox, qos=1)
    again.subscribe("state", state, qos=1)
    lasting.connect(again)
    inbox.wait(20)
    assert inbox.payloads == [b"%d" % i for i in range(20)]
    assert state.wait(1) == [Delivery("state", b"kept", True)]


def test_a_failing_handler_is_counted_and_ends_nothing(world: World) -> None:
    b, inbox = world.client("b"), Inbox()

    def fail(delivery: Delivery) -> None:
        raise RuntimeError(delivery.payload)

    b.subscribe("t", fail, qos=1)
    b.subscribe("t", inbox, qos=1)
    world.connect(b)
    publish(b, "t", b"1")
    publish(b, "t", b"2")
    inbox.wait(2)
    assert b.handler_errors == 2
    assert b.connected


def test_handlers_run_on_one_thread_and_may_publish_and_subscribe(world: World) -> None:
    b, inbox = world.client("b"), Inbox()

    def answer(delivery: Delivery) -> None:
        inbox(delivery)
        b.subscribe("t/2", inbox, qos=1)
        assert b.publish("t/2", b"second", qos=1, retain=True)

    b.subscribe("t/1", answer, qos=1)
    world.connect(b)
    publish(b, "t/1", b"first")
    inbox.wait_for(lambda: b"second" in inbox.payloads)
    assert len(inbox.threads) == 1
    assert threading.get_ident() not in inbox.threads


def test_close_may_be_repeated_and_ends_publishing(world: World) -> None:
    a = world.up("a")
    a.close()
    a.close()
    assert not a.connected
    assert not a.publish("t", b"x", qos=1)
    world.client("never started").close()


def test_malformed_topics_and_filters_are_refused(world: World) -> None:
    a = world.up("a")
    for topic in ("", "a/#", "+", "a\0b", "x" * 70_000):
        with pytest.raises(ValueError, match="topic"):
            a.publish(topic, b"")
    for filter in ("", "a/#/b", "a+", "#a", "a\0b"):
        with pytest.raises(ValueError, match="filter"):
            a.subscribe(filter, Inbox())
