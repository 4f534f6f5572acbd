"""The edge as a process at Mosquitto, killed again and again while devices go on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.edge.overview import overview
from tests.agent.peers.devices import eventually
from tests.brokers import ROOT, Broker, Mosquitto
from tests.server.edge.round_fleet import SUBJECT, Device, update

_CONFIG = """
[edge]
cluster = "A"
folder = "{folder}"
[broker]
url = "{url}"
[rounds]
every = 1.0
collect = {collect}
spread = 0.0
devices = {devices}
share = 0.0
method = "mean"
history = 10000
"""


@contextmanager
def edge_of(config: Path) -> Iterator[subprocess.Popen[str]]:
    """The process, once it serves."""
    code = "from tools.commands.edge import edge; edge()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("skerry edge: serving")
            yield process
        finally:
            process.kill()


def configured(folder: Path, broker: Broker, devices: int, collect: float) -> Path:
    config = folder / "edge.toml"
    config.write_text(_CONFIG.format(folder=folder / "kept", url=broker.url, devices=devices, collect=collect))
    return config


def device(broker: Broker, name: str, threshold: float) -> Device:
    options = MqttOptions(url=broker.url, client_id=name, first_retry=0.05, longest_retry=0.2)
    return Device(MqttTransport(options), name, threshold)


def test_killed_at_any_point_numbers_grow_and_nothing_counts_twice(tmp_path: Path) -> None:
    """Each device sends one update of evidence 10 per round that it hears of. So in each result the evidence is at most
    10 * devices, and over all results no device is in more of them than it has sent updates."""
    random = Random(4)
    with Mosquitto(tmp_path / "broker") as broker:
        config = configured(tmp_path, broker, 20, collect=3.0)
        devices = [device(broker, f"d{number:02}", number / 20) for number in range(20)]
        for turn in range(8):
            with edge_of(config) as edge:
                before = overview(tmp_path / "kept").state
                until = before.round + random.choice([0, 1, 1, 2])
                eventually(lambda until=until: overview(tmp_path / "kept").state.round >= until)  # type: ignore[misc]
                if turn % 2:  # with some of its updates in
                    eventually(lambda: overview(tmp_path / "kept").waiting > 0)
                edge.kill()
                edge.wait()
            after = overview(tmp_path / "kept").state
            assert (after.number, after.round) >= (before.number, before.round)
            for each in random.sample(devices, 5):  # what had been acknowledged once may come again
                each.say(update(max(1, each.answered), base=each.number, threshold=each.threshold))
        with edge_of(config):
            last = overview(tmp_path / "kept").state.number
            eventually(lambda: all(each.number >= last + 2 for each in devices))
        found = overview(tmp_path / "kept")
        sent = sum(len(set(each.calls)) for each in devices)
        assert sum(entry.devices for entry in found.history) <= sent
        assert all(entry.devices <= 20 for entry in found.history)
        for each in devices:
            numbers = [told.number for told in each.agreed]
            assert numbers == sorted(numbers)
            assert each.calls == sorted(each.calls)
            for told in each.agreed:
                level = told.subjects[SUBJECT].cluster
                assert level is not None
                assert level.evidence <= 10.0 * level.devices + 1e-9 <= 200.0 + 1e-9
            each.transport.close()


def test_what_was_accepted_before_the_end_counts_after_it(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker") as broker:
        config = configured(tmp_path, broker, 8, collect=600.0)
        with edge_of(config) as edge:
            first = [device(broker, f"d{number}", 0.25) for number in range(7)]
            eventually(lambda: overview(tmp_path / "kept").waiting == 7)
            edge.kill()
            edge.wait()
        for each in first:
            each.transport.close()  # they will not say it again
        with edge_of(config):
            last = device(broker, "last", 0.25)
            eventually(lambda: last.number > 0)
            level = last.agreed[0].subjects[SUBJECT].cluster
            assert level is not None
            assert (level.devices, level.evidence, level.threshold) == (8, 80.0, 0.25)
            last.transport.close()
