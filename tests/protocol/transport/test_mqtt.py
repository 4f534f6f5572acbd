"""MQTT on a network, and with brokers, that fail in every way."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from protocol.errors import ConfigError
from protocol.transport import mqtt
from protocol.transport.base import Will
from protocol.transport.inbox import packet_bytes
from protocol.transport.mqtt import MAX_PAYLOAD, MqttOptions, MqttTransport
from server.broker.access import set_password
from tests.brokers import Mosquitto, Network, free_port
from tests.protocol.transport.worlds import Inbox, wait_until

CONNACK = bytes([0x20, 2, 0, 0])


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path) as running:
        yield running  # type: ignore[misc]


@pytest.fixture
def network(broker: Mosquitto) -> Iterator[Network]:
    with Network(broker.port) as running:
        yield running


def options(url: str, id: str = "a", **more: Any) -> MqttOptions:
    return MqttOptions(url, id, **{"first_retry": 0.02, "longest_retry": 0.1, **more})


def up(url: str, id: str = "a", **more: Any) -> MqttTransport:
    transport = MqttTransport(options(url, id, **more))
    transport.start()
    wait_until(lambda: transport.connected)
    return transport


def test_small_packets_leave_at_once(broker: Mosquitto) -> None:
    transport = up(broker.url)
    assert transport._client is not None
    connection = transport._client.socket()
    assert isinstance(connection, socket.socket)
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    transport.close()


def test_closing_does_not_wait_for_an_attempt_to_connect() -> None:
    """Whoever answers later finds nobody there, and no handler is called."""
    trying, called = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mqtts://127.0.0.1:{silent.getsockname()[1]}"  # connects, and waits for TLS
        transport = MqttTransport(options(url), trying_will(trying), called.set, called.set)
        transport.start()
        assert trying.wait(30)
        transport.close()
        assert transport._thread.is_alive(), "the attempt was waited for"
        assert transport.state == "closed"
    transport._thread.join(30)
    assert not transport._thread.is_alive()
    assert not called.is_set()


def test_a_broker_that_answers_after_the_end_is_not_greeted(monkeypatch: pytest.MonkeyPatch) -> None:
    trying, answer, ups = threading.Event(), threading.Event(), []
    connect = paho.Client.connect

    def slow(client: paho.Client, *where: Any) -> Any:
        trying.set()
        assert answer.wait(30)
        return connect(client, *where)

    monkeypatch.setattr(paho.Client, "connect", slow)
    with socket.create_server(("127.0.0.1", 0)) as late:
        transport = MqttTransport(options(f"mqtt://127.0.0.1:{late.getsockname()[1]}"), on_up=lambda: ups.append("up"))
        transport.start()
        assert trying.wait(30)
        transport.close()
        answer.set()
        connection, _ = late.accept()
        with connection:
            assert connection.recv(100) == b""
    transport._thread.join(30)
    assert not transport._thread.is_alive()
    assert ups == []


def trying_will(trying: threading.Event) -> Callable[[], Will]:
    """Asked for right before an attempt."""

    def will() -> Will:
        trying.set()
        return Will("t", b"")

    return will


def test_a_broker_that_never_accepts(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "_ACCEPT_SECONDS", 0.2)
    network.freeze()
    transport = MqttTransport(options(network.url))
    transport.start()
    wait_until(lambda: transport.state == "the broker does not answer")
    assert not transport.publish("t", b"")
    network.well()
    wait_until(lambda: transport.connected)
    assert transport.state == "connected"
    transport.close()


def test_a_connection_that_falls_silent_is_given_up(network: Network) -> None:
    down = threading.Event()
    transport = MqttTransport(options(network.url, keepalive=1), on_down=down.set)
    transport.start()
    wait_until(lambda: transport.connected)
    network.freeze()
    assert down.wait(30)
    network.well()
    wait_until(lambda: transport.connected)
    transport.close()


def test_publishing_into_a_frozen_network_is_bounded(network: Network) -> None:
    transport = up(network.url)
    network.freeze()
    accepted = 0
    while transport.publish("t", b"x" * 100_000, qos=1):
        accepted += 1
    assert accepted < 100
    assert transport.connected
    transport.close()  # does not wait for it


@pytest.mark.parametrize("url", ["mqtt://nobody.invalid:1883", f"mqtt://127.0.0.1:{free_port()}"])
def test_nobody_there(url: str) -> None:
    transport = MqttTransport(options(url))
    transport.start()
    wait_until(lambda: transport.state.startswith("unreachable: "))
    transport.close()
    assert transport.state == "closed"


def test_garbage_instead_of_a_broker(tmp_path: Path) -> None:
    """Each connection is answered with other nonsense; after that, a broker is there."""
    broker = Mosquitto(tmp_path)
    nonsense = [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\xff\xff\xff\xff\xff", CONNACK + b"\xf0\0", b"\x30\x02"]
    nonsense += [CONNACK + b"\x30\x05\0\x02\xff\xfex", CONNACK + b"\x90\x00", CONNACK + bytes(range(256))]
    with socket.create_server(("127.0.0.1", broker.port)) as server:
        transport = MqttTransport(options(f"mqtt://127.0.0.1:{broker.port}"))
        transport.subscribe("t", Inbox(), qos=1)
        transport.start()
        for answer in nonsense:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(answer)
            connection.close()
    with broker:
        wait_until(lambda: transport.connected)
        transport.close()
    assert transport.malformed == 1


def test_a_wrong_password_is_told_and_may_be_put_right(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    set_password(passwords, "a", "another")
    with Mosquitto(tmp_path / "m", ["allow_anonymous false", f"password_file {passwords}"]) as broker:
        transport = MqttTransport(options(broker.url, username="a", password="right", refused_retry=0.1))
        transport.start()
        wait_until(lambda: transport.state == "refused: not authorized")
        set_password(passwords, "a", "right")
        assert broker.process is not None
        broker.process.send_signal(signal.SIGHUP)
        wait_until(lambda: transport.connected)
        transport.close()
    assert "right" not in repr(transport.options)


def test_refusals_are_retried_slowly() -> None:
    transport = MqttTransport(MqttOptions("mqtt://x", "a"), jitter=lambda: 1.0)
    pauses = []
    for failures in range(12):
        transport._failures = failures
        pauses.append(transport._pause())
    assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
    assert max(pauses) == pauses[-1] == 30.0
    transport._refused = True
    assert transport._pause() == 60.0


def test_two_clients_with_one_id_are_noticed(broker: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (MqttTransport(options(broker.url, "twin")) for _ in range(2))
    one.start()
    two.start()
    wait_until(lambda: "another client" in one.state and "'twin'" in two.state)
    two.close()
    monkeypatch.setattr(mqtt, "_STABLE_SECONDS", 0.3)
    wait_until(lambda: one.state == "connected")
    one.close()


def test_oversized_messages_are_counted_and_dropped(broker: Mosquitto) -> None:
    a, b, inbox = up(broker.url, "a"), MqttTransport(options(broker.url, "b")), Inbox()
    b.subscribe("t", inbox, qos=1)
    b.start()
    wait_until(lambda: a.publish("t", b"ready") and inbox.got)
    for payload in (b"x" * (MAX_PAYLOAD + 1), b"y" * MAX_PAYLOAD):
        assert a.publish("t", payload, qos=1)
    inbox.wait_for(lambda: any(len(payload) == MAX_PAYLOAD for payload in inbox.payloads))
    assert b.oversized == 1
    assert not any(payload.startswith(b"x") for payload in inbox.payloads)
    a.close()
    b.close()


def test_bytes_are_those_of_the_packets(network: Network) -> None:
    transport, inbox = MqttTransport(options(network.url)), Inbox()
    transport.subscribe("t/x", inbox)
    transport.start()
    wait_until(lambda: transport.connected)
    wait_until(lambda: transport.publish("t/x", b"first") and inbox.got)
    up_before, down_before = transport.bytes_up, transport.bytes_down
    assert transport.publish("t/x", b"payload")
    inbox.wait_for(lambda: b"payload" in inbox.payloads)
    size = transport.bytes_up - up_before
    assert bytes(network.passed[-size:]) == b"\x30\x0c\0\x03t/xpayload"
    assert packet_bytes("t/x", b"payload", 0) == size
    assert transport.bytes_down - down_before >= size
    transport.close()


@pytest.mark.parametrize(
    "url", ["", "http://x", "mqtt://", "x:1883", "mqtt://x:99999", "mqtt://u:p@x", "mqtt://x/topic", "mqtt://[::1"]
)
def test_an_unusable_address_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="broker: ") as failure:
        MqttTransport(MqttOptions(url, "a"))
    assert "u:p" not in str(failure.value)
