"""`skerry broker` beside what the transport's contract says of it: access, limits, and hostile clients."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from protocol.errors import ConfigError
from protocol.transport.base import Will
from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.broker.access import Access, set_password
from server.broker.broker import serve
from tests.brokers import Embedded, Mosquitto
from tests.protocol.transport.worlds import Inbox, wait_until
from tools.commands.broker import broker as command


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Embedded]:
    with Embedded(tmp_path) as running:
        yield running  # type: ignore[misc]


def packet(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    assert len(body) < 128
    return bytes([kind, len(body)]) + body


def text(value: str) -> bytes:
    return struct.pack(">H", len(value)) + value.encode()


def connect(client: str, keepalive: int = 60, will: tuple[str, str] | None = None) -> bytes:
    flags = 0x2C if will else 0
    rest = [text(part) for part in will or ()]
    return packet(0x10, text("MQTT"), bytes([4, flags]), struct.pack(">H", keepalive), text(client), *rest)


@contextmanager
def raw(broker: Embedded) -> Iterator[socket.socket]:
    """A connection without a client."""
    with socket.create_connection(("127.0.0.1", broker.port), timeout=30) as connection:
        yield connection


def listening(broker: Embedded, filter: str, **options: str) -> tuple[MqttTransport, Inbox]:
    transport, inbox = MqttTransport(MqttOptions(broker.url, "ear", **options)), Inbox()
    transport.subscribe(filter, inbox, qos=1)
    transport.start()
    wait_until(lambda: transport.connected)
    return transport, inbox


def test_it_says_where_it_is_and_ends_when_told(broker: Embedded) -> None:
    transport, _ = listening(broker, "t")
    assert broker.stop() == 0
    wait_until(lambda: not transport.connected)
    transport.close()


def test_ctrl_c_ends_it_as_well(broker: Embedded) -> None:
    assert broker.process is not None
    broker.process.send_signal(signal.SIGINT)
    assert broker.process.wait(30) == 0


def test_a_client_that_falls_silent_is_taken_for_dead(broker: Embedded) -> None:
    transport, inbox = listening(broker, "will/#")
    with raw(broker) as connection:
        connection.sendall(connect("mute", keepalive=1, will=("will/mute", "gone")))
        assert connection.recv(4) == b"\x20\x02\0\0"
        assert inbox.wait(1)[0].payload == b"gone"
        assert connection.recv(1) == b""
    transport.close()


def test_a_failed_login_changes_nothing(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    for user in ("a", "ear"):
        set_password(passwords, user, "secret")
    with Embedded(tmp_path, ["--passwords", str(passwords)]) as broker:
        ear, inbox = listening(broker, "skerry/1/+/+/+/status", username="ear", password="secret")
        topic = "skerry/1/home/main/a/status"
        a = MqttTransport(MqttOptions(broker.url, "a", "a", "secret"), will=lambda: Will(topic, b"gone"))
        a.start()
        wait_until(lambda: a.connected)
        for attempt in (("a", "wrong"), ("", ""), ("ear", "")):
            thief = MqttTransport(MqttOptions(broker.url, "a", *attempt))
            thief.start()
            wait_until(lambda: thief.state == "refused: not authorized")  # noqa: B023
            thief.close()
        will = MqttTransport(MqttOptions(broker.url, "c", "ear", "secret"), will=lambda: Will(topic, b"forged"))
        will.start()
        wait_until(lambda: will.state == "refused: not authorized")
        will.close()
        assert a.publish("skerry/1/home/main/ear/status", b"forged", qos=1)
        assert a.publish(topic, b"here", qos=1)
        inbox.wait(1)
        assert a.connected
        assert a.connections == 1
        assert inbox.payloads == [b"here"]
        ear.close()
        a.close()


def test_small_packets_leave_at_once() -> None:
    async def run() -> None:
        broker = await serve("127.0.0.1", 0, None)
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        writer.write(connect("a"))
        assert await reader.readexactly(4) == b"\x20\x02\0\0"
        handler, _ = broker._present["a"]
        accepted = handler.writer._writer.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()
        await broker.shutdown()

    asyncio.run(run())


def test_rubbish_at_the_socket(broker: Embedded) -> None:
    """Whatever a client sends, before or after its login, the others do not notice."""
    transport, inbox = listening(broker, "t")
    chance = random.Random(7)
    login = connect("rubbish")
    for round in range(60):
        with raw(broker) as connection:
            begin = [b"", login, login[: chance.randrange(len(login))]][round % 3]
            connection.sendall(begin + chance.randbytes(chance.randrange(1, 300)))
    with raw(broker) as connection:
        connection.sendall(login + b"\x30\xff\xff\xff\x7f" + text("t") + b"x" * 100_000)  # a packet of 256 MB
        while connection.recv(1000):
            pass
    assert transport.publish("t", b"still here", qos=1)
    inbox.wait_for(lambda: b"still here" in inbox.payloads)
    assert transport.connections == 1
    transport.close()


def test_a_client_that_reads_nothing_holds_nobody_up(broker: Embedded) -> None:
    with raw(broker) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(connect("lazy") + packet(0x82, b"\0\1", text("t"), b"\1"))
        transport, inbox = listening(broker, "t")
        for number in range(100):
            assert transport.publish("t", b"%d" % number + b" " * 50_000, qos=1)
        inbox.wait(100)
    transport.close()


def test_only_this_machine_without_passwords(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--host", "0.0.0.0", "--port", "0"])
    assert isinstance(result.exception, ConfigError)
    assert "skerry broker password" in str(result.exception)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(command, ["--port", str(taken.getsockname()[1])])
    assert isinstance(result.exception, ConfigError)
    assert "cannot listen on 127.0.0.1:" in str(result.exception)


def test_the_password_file_is_the_one_of_mosquitto(tmp_path: Path) -> None:
    path = tmp_path / "new" / "passwords"
    runner = CliRunner()
    for user, password in (("a", "first"), ("b", "other"), ("a", "second")):
        result = runner.invoke(command, ["password", str(path), user], input=f"{password}\n{password}\n")
        assert result.exit_code == 0, result.output
    access = Access.of(path)
    assert access.admits("a", "second")
    assert access.admits("b", "other")
    for user, password in (("a", "first"), ("b", ""), ("c", "second"), (None, None), ("", "")):
        assert not access.admits(user, password)
    with Mosquitto(tmp_path / "m", ["allow_anonymous false", f"password_file {path}"]) as mosquitto:
        transport = MqttTransport(MqttOptions(mosquitto.url, "x", "a", "second"))
        transport.start()
        wait_until(lambda: transport.connected)
        transport.close()


@pytest.mark.parametrize("content", [b"a:plain\n", b"a:$7$x$AAAA$AAAA\n", b"a:$6$AAAA$AAAA\n", b"a\n", b"\xff\xfe"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "passwords"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="password file"):
        Access.of(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Access.of(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be a user"):
        set_password(path, "a/b", "x")


def test_with_passwords_a_user_writes_below_its_own_name_alone(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    set_password(path, "a", "x")
    access = Access.of(path)
    assert access.may_publish("a", "skerry/1/home/main/a/status")
    for topic in ("skerry/1/home/main/b/status", "skerry/1/home/main/a", "t", "skerry/1/a/a/b/a", "skerry/2/h/m/a/x"):
        assert not access.may_publish("a", topic)
    assert access.may_hear("a", "skerry/1/home/main/+/status")
    assert not access.may_hear("a", "#")
    for filter in ("+/round/update", "b/round/+", "#", "+/#", "b/round/#", "+/+/+", "b/round/update/#"):
        assert not access.may_hear("a", f"skerry/1/home/main/{filter}"), "what devices tell the edge is for the edge"
    for filter in ("edge/round", "+/memory/ask/a", "+/status", "a/#", "b/round/secure/a"):
        assert access.may_hear("a", f"skerry/1/home/main/{filter}")
    assert access.may_hear("edge", "skerry/1/home/main/+/round/update")
    anybody = Access.of(None)
    assert anybody.admits(None, None)
    assert anybody.may_publish(None, "t")
    assert anybody.may_hear(None, "#")
