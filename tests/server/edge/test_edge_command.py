"""`skerry edge` as processes between two real brokers, which come and go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from protocol.errors import ConfigError
from protocol.topics import Cluster
from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.edge.config import Broker, EdgeConfig, Neighbours, Place, assemble
from tests.agent.peers.devices import Device, eventually
from tests.brokers import ROOT, Mosquitto
from tests.brokers import Broker as AnyBroker
from tests.protocol.entries import SPACE, entry
from tools.commands.edge import edge

A, B = Cluster("home", "A"), Cluster("home", "B")


@contextmanager
def edge_of(cluster: str, broker: AnyBroker, neighbour: str) -> Iterator[subprocess.Popen[str]]:
    """The process, once it serves."""
    code = "from tools.commands.edge import edge; edge()"
    options = ["--fleet", "home", "--cluster", cluster, "--broker", broker.url, "--neighbour", neighbour]
    with subprocess.Popen(
        [sys.executable, "-c", code, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"skerry edge: serving cluster {cluster} at {broker.url}\n"
            yield process
        finally:
            process.kill()


def device(folder: Path, broker: AnyBroker, cluster: Cluster, name: str, number: int) -> Device:
    transport = MqttTransport(MqttOptions(url=broker.url, client_id=name, first_retry=0.05, longest_retry=0.2))
    return Device(folder, name, number, transport=transport, cluster=cluster)


def test_two_clusters_answer_each_other_through_outages(tmp_path: Path) -> None:
    with ExitStack() as stack:
        here, there = (stack.enter_context(Mosquitto(tmp_path / name)) for name in "ab")
        first = stack.enter_context(edge_of("A", here, f"B={there.url}"))
        stack.enter_context(edge_of("B", there, f"A={here.url}"))
        lamp = stack.enter_context(device(tmp_path, here, A, "lamp", 1))
        fridge = stack.enter_context(device(tmp_path, there, B, "fridge", 2))
        fridge.memory.add([entry(fridge.who, number, token=number) for number in range(10)])
        lamp.memory.add([entry(lamp.who, number, token=number) for number in range(100, 110)])

        def answered(asker: Device, number: int) -> None:
            """Sooner or later: a question may get lost while somebody is still connecting."""

            def once() -> bool:
                asker.woken.clear()
                ticket = asker.ask(number)
                asker.woken.wait(1.0 if ticket else 0.0)
                return ticket is not None and ticket.reply is not None and ticket.reply.tokens == [number]

            eventually(once)

        answered(lamp, 1)
        answered(fridge, 101)

        there.stop()  # the neighbour's broker
        eventually(lambda: not lamp.network.around.reaches(SPACE, 4))
        assert lamp.ask(2) is None
        there.restart(persistence=False)
        answered(lamp, 2)

        here.stop()  # the own broker
        eventually(lambda: not lamp.transport.connected)
        here.restart(persistence=True)
        answered(lamp, 3)

        first.kill()  # the edge itself: its will takes back what it told
        eventually(lambda: not lamp.network.around.reaches(SPACE, 4))
        assert lamp.ask(4) is None
        again = stack.enter_context(edge_of("A", here, f"B={there.url}"))
        answered(lamp, 4)

        again.terminate()
        assert again.wait(30) == 0
        eventually(lambda: not lamp.network.around.reaches(SPACE, 4))
        for one in (lamp, fridge):
            assert one.transport.handler_errors == 0


class TestConfiguration:
    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (EdgeConfig(Place(cluster="A"), neighbours=Neighbours(["A=mqtt://b"])), "this edge's own"),
            (EdgeConfig(neighbours=Neighbours(["mqtt://b"])), "CLUSTER=VALUE"),
            (EdgeConfig(neighbours=Neighbours(["B=mqtt://b", "B=mqtt://c"])), "CLUSTER=VALUE"),
            (EdgeConfig(neighbours=Neighbours(["a/b=mqtt://b"])), "cannot be part of a topic"),
            (EdgeConfig(neighbours=Neighbours(["B=http://b"])), "mqtt://host:port"),
            (EdgeConfig(neighbours=Neighbours(passwords=["B=secret"])), "none of neighbours.brokers"),
            (EdgeConfig(Place(cluster="c" * 62), neighbours=Neighbours(["B=mqtt://b"])), "cannot be part of a topic"),
            (EdgeConfig(broker=Broker(url="mqtts://user:secret@b")), "mqtt"),
        ],
    )
    def test_mistakes_are_told(self, config: EdgeConfig, reason: str) -> None:
        with pytest.raises(ConfigError, match=reason) as told:
            assemble(config)
        assert "secret" not in str(told.value)

    def test_a_file_is_read_and_the_command_line_wins(self, tmp_path: Path) -> None:
        file = tmp_path / "edge.toml"
        file.write_text('[edge]\ncluster = "A"\n[neighbours]\nbrokers = ["B=mqtt://b"]\n')
        told = CliRunner().invoke(edge, ["--config", str(file), "--neighbour", "A=mqtt://a"])
        assert isinstance(told.exception, ConfigError)
        assert "this edge's own" in str(told.exception)

    def test_passwords_go_with_the_users_that_the_access_list_knows(self) -> None:
        config = EdgeConfig(
            Place(cluster="A"),
            Broker(password="one\n"),
            Neighbours(["B=mqtt://b", "C=mqtt://c"], ["B=two"]),
        )
        running = assemble(config)
        transports = [running.home, running.neighbours["B"], running.neighbours["C"]]
        options = [transport.options for transport in transports if isinstance(transport, MqttTransport)]
        assert [(one.username, one.password) for one in options] == [("edge", "one"), ("edge.A", "two"), ("", "")]
        assert len({one.client_id for one in options}) == 3
