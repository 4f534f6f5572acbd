"""`skerry simulate` with a small fleet: a real broker, the real edge service, fifty devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import LinkError
from protocol.rounds import Agreed, Call, Learned, Level, decode_update
from tests.brokers import Mosquitto
from tools.mosquitto import mosquitto
from tools.simulate.device import GOAL, SUBJECT, Device
from tools.simulate.world import Kind, Nature

QUICK = ["--devices", "50", "--rounds", "2", "--spread", "0.2", "--delay", "0.05"]


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.cli", "simulate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def result(*arguments: str) -> dict[str, Any]:
    done = simulate(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    of: dict[str, Any] = json.loads(done.stdout)
    return of


def test_every_update_that_the_broker_acknowledged_is_accounted_for_despite_churn_and_cuts() -> None:
    of = result(*QUICK, "--away", "0.2", "--cut", "0.5", "--no-scaling")
    assert of["lost_updates"] == 0
    assert of["updates_acknowledged"] == 2 * 50, "those that were away answer late"
    assert of["present"] == 40
    assert all(40 <= counted <= 50 for counted in of["counted"])
    assert of["connections_cut"] >= 20
    assert of["refused"]["duplicate"] > 0, "what was cut off behind its update sends it again"
    assert of["updates_sent"] == of["updates_acknowledged"] + of["refused"]["duplicate"]
    assert of["round_s"] > 0
    assert 300 < of["bytes_per_device_round"] < 1000
    assert of["wire_bytes_per_device_round"] > of["bytes_per_device_round"]
    assert 10 < of["edge_rss_mb"] < 300
    assert of["off"][-1] < of["off_start"], "the devices learned"
    assert of["scaling"] is None


def test_a_fleet_of_a_tenth_is_run_beside_it() -> None:
    done = simulate("--devices", "100", "--rounds", "1", "--spread", "0.2", "--delay", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert "10 devices: " in done.stderr, "progress is told"
    scaling = json.loads(done.stdout)["scaling"]
    assert scaling["devices"] == [10, 100]
    assert 0.8 < scaling["bytes_ratio"] < 1.2
    assert scaling["lost_updates"] == 0


def test_a_fifth_that_lies_moves_what_is_agreed_less_than_a_mean_would_be_moved() -> None:
    honest, attacked = result(*QUICK, "--no-scaling"), result(*QUICK, "--no-scaling", "--hostile", "0.2")
    moved = abs(attacked["agreed"][-1] - honest["agreed"][-1])
    assert moved < 0.2 * (1.0 - honest["agreed"][-1]), "a fifth of the way to the lie is what the mean would go"


def test_a_broker_that_goes_on_running_keeps_nothing_of_it(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        of = result(*QUICK, "--no-scaling", "--broker", broker.url)
        assert of["lost_updates"] == 0
        broker.stop()
    assert b"simulated-" not in (tmp_path / "mosquitto.db").read_bytes(), "neither sessions nor retained messages"


def test_without_mosquitto_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.mosquitto._PATHS", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LinkError, match="apt-get install mosquitto"), mosquitto(tmp_path):
        pass


def test_ctrl_c_stops_its_children_and_removes_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.cli", "simulate", "--devices", "50", "--no-scaling", "--spread", "600"]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert running.stdout is not None
    for line in running.stdout:
        if "round 1: " in line:
            break
    children = children_of(running.pid)
    assert len(children) == 2, "a broker and an edge"
    running.send_signal(signal.SIGINT)
    rest = running.stdout.read()
    assert running.wait(60) == 130, rest
    assert "Traceback" not in rest
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not list(tmp_path.iterdir())


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_device_finds_its_own_threshold_and_leans_on_the_others_while_it_knows_little() -> None:
    random = np.random.default_rng(1)
    device = Device("d", Nature(Kind(0.8, 0.0, 1.2, 2.0), 400), hostile=False)
    start = device.off
    device.live(random)
    alone = device.threshold
    device.heed(Agreed(2, 1, {SUBJECT: Learned(Level(0.25, 1000.0, 100))}))
    assert abs(device.threshold - 0.25) < abs(alone - 0.25), "others are heeded"
    device.heed(Agreed(1, 1, {SUBJECT: Learned(Level(1.0, 1000.0, 100))}))
    assert device.base == 2, "an older number is out of date"
    for _ in range(4):
        device.live(random)
    assert device.off < start / 2
    update = decode_update(device.update(Call(7, 60.0)))
    assert update is not None
    assert (update.round, update.base, update.subject) == (7, 2, SUBJECT)
    assert device.nature.optimum(GOAL.price) == pytest.approx(0.25)
