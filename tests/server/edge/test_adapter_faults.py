"""Rounds of adapters through kills, outages and a full disk: real processes, a real broker, real HTTP."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from models.adapter import Adapter, Factors, read, write
from server.edge.adapter_overview import AdapterOverview, adapter_overview
from tests.agent.peers.devices import eventually
from tests.brokers import ROOT, Broker, Mosquitto, Network, free_port
from tests.server.edge.adapter_fleet import MODEL, Device, Fleet, Narrow, adapter

_CONFIG = """
[edge]
cluster = "A"
folder = "{folder}"
[broker]
url = "{broker}"
[rounds]
enabled = false
[adapters]
enabled = true
every = 1000000.0
collect = 600.0
spread = 0.0
devices = 1
port = {port}
url = "{url}"
"""
_DEVICE = """
import sys, threading
from pathlib import Path
from tests.server.edge.adapter_fleet import Device
device = Device(Path(sys.argv[1]), sys.argv[2], "d", None)
print("ready", flush=True)
threading.Event().wait()
"""


def large(seed: int) -> Adapter:
    """Its file has some 6 MB."""
    random = np.random.default_rng(seed)
    a, b = (random.normal(size=shape).astype(np.float32) * np.float32(0.01) for shape in ((64, 24_000), (24_000, 64)))
    return Adapter(MODEL, "llama", 8.0, {"blk.0.attn_q": Factors(a, b)})


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Once it has said its first line."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline()
            yield started
        finally:
            started.kill()


class Place:
    """An edge as a process, whose files go through a network that narrows after `most` bytes."""

    def __init__(self, folder: Path, broker: Broker, most: int = 1 << 40) -> None:
        self.folder = folder
        self.port = free_port()
        self.network = Narrow(self.port, most)
        self.config = folder / "edge.toml"
        url = f"http://127.0.0.1:{self.network.port}/v1/adapters"
        self.config.write_text(
            _CONFIG.format(folder=folder / "kept", broker=broker.url, port=self.port, url=url), encoding="utf-8"
        )

    @contextmanager
    def edge(self) -> Iterator[subprocess.Popen[str]]:
        with process("-c", "from tools.commands.edge import edge; edge()", "--config", str(self.config)) as started:
            yield started

    def look(self) -> AdapterOverview:
        return adapter_overview(self.folder / "kept")

    def partial(self) -> int:
        """Bytes of the upload that is under way."""
        return sum(path.stat().st_size for path in (self.folder / "kept/adapters/incoming").glob("*.partial"))


def test_an_edge_killed_in_mid_upload_goes_on_where_it_was(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker") as broker:
        place = Place(tmp_path, broker, most=2 << 20)
        with place.network, place.edge() as edge:
            device = Device(tmp_path / "devices", broker.url, "d", large(1))
            assert place.network.stuck.wait(60)
            eventually(lambda: place.partial() > 1 << 20)
            edge.kill()
            edge.wait()
            kept = place.partial()
            with place.edge():
                place.network.widen()
                eventually(lambda: bool(device.considered))
            size = device.path.stat().st_size
            assert len(place.network.passed) < 2 * size - kept // 2  # it was not sent all over again
            assert read(device.considered[0][0]).rank == 64
            assert place.look().state.number == 1
            device.close()


def test_what_was_uploaded_before_the_edge_was_killed_counts_after_it(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker") as broker:
        place = Place(tmp_path, broker)
        place.config.write_text(place.config.read_text().replace("devices = 1", "devices = 2"))
        with place.network:
            with place.edge() as edge:
                first = Device(tmp_path / "devices", broker.url, "d1", adapter(1))
                eventually(lambda: first.federation.past.answered == 1)
                first.close()  # it will not say it again
                edge.kill()
                edge.wait()
            with place.edge():
                last = Device(tmp_path / "devices", broker.url, "d2", adapter(2))
                eventually(lambda: bool(last.considered))
                assert place.look().groups[0].group.devices == 2
                last.close()


def test_a_device_killed_in_mid_upload_goes_on_where_it_was(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker") as broker:
        place = Place(tmp_path, broker, most=2 << 20)
        own = tmp_path / "devices" / "d" / "own.gguf"
        write(large(1), own)
        command = ("-c", _DEVICE, str(tmp_path / "devices"), broker.url)
        with place.network, place.edge():
            with process(*command) as device:
                assert place.network.stuck.wait(60)
                eventually(lambda: place.partial() > 1 << 20)
                device.kill()
                device.wait()
            kept = place.partial()
            place.network.widen()
            with process(*command):
                eventually(lambda: place.look().state.number == 1)
            assert len(place.network.passed) < 2 * own.stat().st_size - kept // 2
            assert place.look().reasons() == {}  # what it says twice is the same


def test_a_full_disk_at_the_edge_costs_a_try_and_no_more(tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker") as broker:
        place = Place(tmp_path, broker)
        with place.network, place.edge() as edge:
            resource.prlimit(edge.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            device = Device(tmp_path / "devices", broker.url, "d", large(1))
            eventually(lambda: device.federation.counts["retried"] > 1)
            assert place.look().uploaded == 0
            resource.prlimit(edge.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            eventually(lambda: bool(device.considered))
            assert device.federation.counts["skipped"] == 0
            device.close()


def test_without_the_broker_it_tries_again_until_the_round_is_over(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.edge(devices=1)
        fleet.called(1)
        with Network(fleet.broker.port) as network:
            device = Device(tmp_path / "devices", network.url, "d", adapter(1), before=network.drop)
            eventually(lambda: device.federation.counts["retried"] > 0)
            assert fleet.look().offered == 0
            device.before = lambda: None
            network.well()
            eventually(lambda: bool(device.considered))
            assert device.federation.counts["uploaded"] == 1
            device.close()


def test_a_round_that_nobody_can_reach_is_skipped_and_the_next_one_is_not(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.edge(url="http://127.0.0.1:1/v1/adapters", collect=1.5)
        device = fleet.device("d", adapter(1))
        eventually(lambda: device.federation.counts["skipped"] == 1)
        eventually(lambda: not fleet.look().state.collecting)
        assert fleet.look().state.number == 0
        fleet.edge(devices=1, collect=600.0)
        fleet.order("round")
        eventually(lambda: bool(device.considered))
        assert device.federation.past.answered == 2
