"""Real agents that learn from a real cloud, and from each other through a real edge and broker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.agent.running import ROOT, RunningAgent, running
from tests.brokers import Mosquitto
from tests.hybrid.test_fleet import ask, eventually
from tools.processes import start_cloud

SETTINGS = {
    "SKERRY_MODEL_THREADS": "1",
    "SKERRY_CLOUD_DEADLINE_MS": "20000",
    "SKERRY_POLICY_THRESHOLD": "0.05",
    "SKERRY_MEMORY_AUDIT": "1",  # so that each escalation reaches the cloud, whatever memory knows
}
QUESTIONS = ("Why is the sky blue?", "How do I keep bread fresh?", "What is a skerry?", "Tell me of whales.")


class Edge:
    def __init__(self, broker: Mosquitto, folder: Path) -> None:
        options = ["--config", str(folder / "edge.toml")]
        (folder / "edge.toml").write_text(
            f'[edge]\nfolder = "{folder / "edge"}"\n[broker]\nurl = "{broker.url}"\n'
            "[rounds]\nevery = 100000\ncollect = 2\nspread = 0\ndevices = 1\nshare = 0\n"
        )
        self._command = [sys.executable, "-m", "tools.cli", "edge", *options]
        self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def tell(self, *words: str) -> str:
        return subprocess.run([*self._command, *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def fleet(smollm2: Path, smollm2_q2: Path, tmp_path: Path) -> Iterator[tuple[RunningAgent, RunningAgent, Edge]]:
    """The first device has a cloud, the second only the broker."""
    with ExitStack() as stack:
        broker = stack.enter_context(Mosquitto(tmp_path / "broker"))
        cloud, port = start_cloud(str(smollm2), 1)
        stack.enter_context(cloud)
        agents = []
        for name, url in (("first", f"http://127.0.0.1:{port}"), ("second", "")):
            (tmp_path / name).mkdir()
            own = {"SKERRY_DEVICE_NAME": name, "SKERRY_CLOUD_URL": url, "SKERRY_PEERS_BROKER": broker.url}
            agents.append(stack.enter_context(running(smollm2_q2, tmp_path / name, SETTINGS | own)))
        edge = Edge(broker, tmp_path)
        stack.callback(edge.process.wait, 30)
        stack.callback(edge.process.terminate)
        yield agents[0], agents[1], edge


def test_what_one_device_learned_another_one_goes_by(fleet: tuple[RunningAgent, RunningAgent, Edge]) -> None:
    first, second, edge = fleet
    eventually(lambda: first.metric("skerry_cloud_connected") == 1.0)
    for question in QUESTIONS:
        ask(first, question)
    edge.tell("round")
    eventually(lambda: first.metric("skerry_policy_number") >= 1.0)
    assert first.metric("skerry_round_answered") >= 1.0
    learned = first.metric("skerry_policy_own_threshold")
    assert learned != 0.05
    eventually(lambda: second.metric("skerry_policy_number") >= 1.0)
    eventually(lambda: second.metric("skerry_policy_threshold") == pytest.approx(learned, abs=0.01))
    told = json.loads(edge.tell("status", "--json"))
    assert told["devices"]["known"] == 1, "the second one had learned nothing to tell"
