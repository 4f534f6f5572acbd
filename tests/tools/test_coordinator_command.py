"""`skerry coordinator` as a user runs it: a process of its own, which is killed and started again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from protocol.errors import ConfigError, StoreError, StoreInUse
from protocol.rounds import Report, Told
from protocol.transport.mqtt import MqttTransport
from server.coordinator.config import Clusters, CoordinatorConfig, Fleet, assemble
from server.coordinator.store import StateFile
from tests.brokers import Mosquitto
from tests.server.coordinator.fleet import FLEET, SUBJECT, Edge, level, mqtt, report
from tools.commands.coordinator import coordinator
from tools.processes import Child


class Site:
    """Two clusters with a broker each, their edges, and the coordinator's process."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder / "state"
        self.brokers = {name: stack.enter_context(Mosquitto(folder / name)) for name in "AB"}
        self.edges = {name: Edge(mqtt(broker.url, f"edge-{name}"), name) for name, broker in self.brokers.items()}
        for edge in self.edges.values():
            stack.callback(edge.transport.close)
        self.child: Child | None = None
        stack.callback(lambda: self.child and self.child.kill())

    def options(self) -> list[str]:
        clusters = [f"--cluster={name}={broker.url}" for name, broker in self.brokers.items()]
        return [*clusters, "--fleet", FLEET, "--folder", str(self.folder)]

    def start(self) -> None:
        self.child = Child(["coordinator", *self.options()], env={"SKERRY_COORDINATOR_PAUSE_S": "0.05"})
        self.child.wait_for(f"skerry coordinator: serving fleet {FLEET}, clusters A, B")

    def status(self) -> Any:
        told = CliRunner().invoke(coordinator, [*self.options(), "status", "--json"])
        assert told.exception is None, told.output
        return json.loads(told.output)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def test_numbers_never_go_back_over_random_ends(site: Site) -> None:
    """Killed or ended, with or without its file; and the brokers too, which keep what they had."""
    choose = random.Random(4)
    events = ["kill", "kill and lose", "stop", "stop and lose", "broker"]
    site.start()
    for turn, event in enumerate(choose.sample(events * 2, 7), start=1):
        threshold = 0.1 + turn / 20
        for edge in site.edges.values():
            known = edge.numbers[-1] if edge.numbers else 0
            edge.tell(Report(turn, {SUBJECT: Told(level(threshold), known)}))
        for edge in site.edges.values():
            edge.wait(threshold)
        assert site.child is not None
        if event == "broker":
            broker = site.brokers[choose.choice("AB")]
            broker.kill()
            broker.restart(persistence=True)
            continue
        if event.startswith("kill"):
            site.child.kill()
        else:
            assert site.child.stop() == 0
        if event.endswith("lose"):
            shutil.rmtree(site.folder)
        site.start()
    for edge in site.edges.values():
        assert edge.said == sorted(edge.said)
        assert edge.said[-1] >= 7


def test_status_while_it_runs_and_after(site: Site) -> None:
    site.start()
    site.edges["A"].tell(report(3, 0.25, evidence=40.0))
    number = site.edges["B"].wait(0.25).number
    found = site.status()
    assert (found["fleet"], found["running"], found["number"]) == (FLEET, True, number)
    first, second = found["clusters"]
    assert (first["cluster"], first["number"], first["counts"], first["subjects"]) == ("A", 3, True, [SUBJECT])
    assert first["age_s"] >= 0.0
    assert (second["cluster"], second["number"], second["age_s"], second["counts"]) == ("B", None, None, False)
    assert found["subjects"] == [{"subject": SUBJECT, "threshold": 0.25, "evidence": 40.0, "devices": 10, "groups": []}]
    assert site.child is not None
    site.child.kill()
    found = site.status()
    assert (found["running"], found["number"]) == (False, number)
    text = CliRunner().invoke(coordinator, [*site.options(), "status"]).output
    for words in ("not running", f"overall    {number}", "A: report 3", "B: no report yet", "threshold 0.250"):
        assert words in text


def test_a_second_one_is_told_to_go(site: Site, tmp_path: Path) -> None:
    file = StateFile(site.folder)
    told = CliRunner().invoke(coordinator, site.options())
    assert isinstance(told.exception, StoreInUse)
    file.close()


def test_without_a_state_there_is_nothing_to_show(tmp_path: Path) -> None:
    told = CliRunner().invoke(coordinator, ["--folder", str(tmp_path / "none"), "status"])
    assert isinstance(told.exception, StoreError)


@pytest.mark.parametrize("arguments", [[], ["status"]])
def test_every_command_explains_itself_with_an_example(arguments: list[str]) -> None:
    result = CliRunner().invoke(coordinator, [*arguments, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert "skerry coordinator" in result.stdout


class TestConfiguration:
    @pytest.mark.parametrize(
        ("clusters", "reason"),
        [
            (Clusters(), "name the clusters"),
            (Clusters(["mqtt://b"]), "CLUSTER=VALUE"),
            (Clusters(["A=mqtt://b", "A=mqtt://c"]), "CLUSTER=VALUE"),
            (Clusters(["a/b=mqtt://b"]), "cannot be part of a topic"),
            (Clusters(["A=http://b"]), "mqtt://host:port"),
            (Clusters(["A=mqtts://user:secret@b"]), "mqtt"),
            (Clusters(["A=mqtt://b"], ["B=secret"]), "none of clusters.brokers"),
            (Clusters(["A=mqtt://b", "B=mqtt://b:1883"], ["A=secret", "B=secret too"]), "one password"),
        ],
    )
    def test_mistakes_are_told(self, clusters: Clusters, reason: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=reason) as told:
            assemble(CoordinatorConfig(Fleet(folder=str(tmp_path)), clusters))
        assert "secret" not in str(told.value)
        assert list(tmp_path.iterdir()) == []

    def test_clusters_at_one_broker_share_a_connection_and_its_password(self, tmp_path: Path) -> None:
        clusters = Clusters(["A=mqtt://b", "B=mqtt://c", "C=mqtt://b:1883/"], ["A=one\n", "B=two"])
        running = assemble(CoordinatorConfig(Fleet("farm", str(tmp_path)), clusters))
        links = [(link.transport, link.clusters) for link in running.links]
        running.close()
        assert [names for _, names in links] == [["A", "C"], ["B"]]
        options = [transport.options for transport, _ in links if isinstance(transport, MqttTransport)]
        assert [(one.username, one.password) for one in options] == [("coordinator", "one"), ("coordinator", "two")]
        assert {one.client_id for one in options} == {"farm.coordinator"}

    def test_a_file_is_read_and_the_command_line_wins(self, tmp_path: Path) -> None:
        file = tmp_path / "coordinator.toml"
        file.write_text(
            f'[coordinator]\nfolder = "{tmp_path}/none"\n[clusters]\nbrokers = ["A=mqtt://b"]\n[groups]\nby = "what"\n'
        )
        told = CliRunner().invoke(coordinator, ["--config", str(file)])
        assert isinstance(told.exception, ConfigError)
        assert "declared, similarity" in str(told.exception)
        told = CliRunner().invoke(coordinator, ["--config", str(file), "--groups", "similarity", "--cluster", "B=x"])
        assert isinstance(told.exception, ConfigError)
        assert "mqtt://host:port" in str(told.exception)
