"""The production configuration of Mosquitto, as it is in deploy/: only its paths and its port are others here."""

from __future__ import annotations

import getpass
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.broker import access
from server.broker.access import set_password
from tests.brokers import ROOT, Mosquitto
from tests.protocol.transport.worlds import PATIENCE, Inbox, wait_until

DEPLOY = ROOT / "deploy" / "mosquitto"
USERS = ("a", "b", "edge", "edge.north")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    ours = tmp_path / "etc"
    ours.mkdir()
    for user in USERS:
        set_password(ours / "passwords", user, f"secret of {user}")
    (ours / "acl").write_text((DEPLOY / "acl").read_text())
    for file in ours.iterdir():
        file.chmod(0o600)
    made = Mosquitto(tmp_path / "run")
    text = (DEPLOY / "mosquitto.conf").read_text()
    text = text.replace("/etc/mosquitto/skerry", str(ours)).replace("/var/lib/mosquitto", str(made.folder))
    text = text.replace("listener 1883 ", f"listener {made.port} ")
    made.config.write_text(f"{text}\nuser {getpass.getuser()}\nlog_dest stderr\nlog_type information\n")
    with made:
        yield made  # type: ignore[misc]


def client(broker: Mosquitto, user: str, password: str | None = None) -> MqttTransport:
    secret = f"secret of {user}" if password is None else password
    transport = MqttTransport(MqttOptions(broker.url, f"client of {user}", user, secret))
    transport.start()
    return transport


def heard_by(broker: Mosquitto, user: str) -> Inbox:
    inbox, transport, ready = Inbox(), client(broker, user), Inbox()
    transport.subscribe("#", inbox, qos=1)
    transport.subscribe(f"skerry/1/home/main/{user}/ready", ready, qos=1)
    wait_until(lambda: transport.publish(f"skerry/1/home/main/{user}/ready", b"", qos=1) and ready.got)
    return inbox


@pytest.mark.parametrize("user", USERS)
def test_a_user_writes_below_its_own_name_alone(broker: Mosquitto, user: str) -> None:
    inbox = heard_by(broker, "a" if user == "edge" else "edge")
    transport = client(broker, user)
    wait_until(lambda: transport.connected)
    others = [other for other in USERS if other != user]
    forbidden = [f"skerry/1/home/main/{other}/status" for other in others]
    forbidden += ["skerry/1/home/main/status", f"skerry/1/home/main/x/{user}/status", "elsewhere", f"{user}/status"]
    allowed = [f"skerry/1/home/main/{user}/status", f"skerry/1/home/main/{user}/memory/ask/a"]
    done = threading.Event()
    for topic in forbidden + allowed:
        assert transport.publish(topic, user.encode(), qos=1, retain=True, done=done.set)
    inbox.wait_for(lambda: sum(delivery.payload == user.encode() for delivery in inbox.got) == 2)
    assert [delivery.topic for delivery in inbox.got if delivery.payload == user.encode()] == allowed
    assert done.wait(PATIENCE)
    transport.close()


def test_what_a_device_tells_the_edge_no_other_device_hears(broker: Mosquitto) -> None:
    edge, other = heard_by(broker, "edge"), heard_by(broker, "b")
    transport = client(broker, "a")
    wait_until(lambda: transport.connected)
    transport.publish("skerry/1/home/main/a/round/update", b"update", qos=1)
    transport.publish("skerry/1/home/main/a/status", b"status", qos=1)
    for inbox in (edge, other):
        inbox.wait_for(lambda inbox=inbox: b"status" in inbox.payloads)  # type: ignore[misc]
    assert b"update" in edge.payloads
    assert b"update" not in other.payloads
    transport.close()


def test_the_embedded_broker_has_the_same_rules() -> None:
    lines = [line.split() for line in (DEPLOY / "acl").read_text().splitlines() if line and line[0] != "#"]
    found: dict[str, set[str]] = {"": set()}
    user = ""
    for line in lines:
        if line[0] == "user":
            user = line[1]
        elif line[1] == "read":
            found.setdefault("" if line[0] == "pattern" else user, set()).add(line[2].replace("%u", "{user}"))
    everybody = {f"skerry/1/+/+/{pattern}" for pattern in access._HEARD}
    special = {who: {f"skerry/1/+/+/{one}" for one in patterns} for who, patterns in access._HEARD_BY.items()}
    assert found == {"": everybody, **special}


@pytest.mark.parametrize(("user", "password"), [("a", "wrong"), ("nobody", "x"), ("", "")])
def test_nobody_else_connects(broker: Mosquitto, user: str, password: str) -> None:
    transport = client(broker, user, password)
    wait_until(lambda: transport.state.startswith("refused: "))
    transport.close()


def test_what_is_too_large_is_not_passed_on(broker: Mosquitto) -> None:
    inbox = heard_by(broker, "b")
    transport = client(broker, "a")
    wait_until(lambda: transport.connected)
    transport.publish("skerry/1/home/main/a/memory/new", b"x" * (262_144 + 1), qos=1)
    wait_until(lambda: transport.publish("skerry/1/home/main/a/memory/new", b"y" * 262_144, qos=1))
    inbox.wait_for(lambda: any(payload.startswith(b"y") for payload in inbox.payloads))
    assert not any(payload.startswith(b"x") for payload in inbox.payloads)
    transport.close()
