"""`skerry demo` as a user runs it: to its end, and interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

DEMO = [sys.executable, "-m", "tools.cli", "demo", "--tokens", "16"]


def test_what_one_device_learned_serves_the_other_one_and_outlives_cloud_and_broker(smollm2: Path, qwen: Path) -> None:
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+(?: too)?)" + r" +(\d+)" * 5 + r" +(\d+)%", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["harbour"] * 2 + ["lighthouse"] * 2 + ["alone", "alone too"]
    _, memory, peer, cloud, _, saved = zip(*(map(int, row[1:]) for row in rows), strict=True)
    assert all(cloud[row] > 0 for row in (0, 1)), "the cloud helps the first device"
    assert cloud[2:] == (0, 0, 0, 0)
    assert all(memory[row] + peer[row] > 0 for row in (2, 3, 4, 5)), "what it said is known to both from then on"
    assert saved[2:] == (100, 100, 100, 100)
    assert "learned elsewhere" in done.stdout


def test_ctrl_c_stops_everything_it_started(smollm2: Path, qwen: Path) -> None:
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith("Each token is coloured"):
            break
    children = children_of(demo.pid)
    assert children, "the cloud runs as a process of its own"
    demo.send_signal(signal.SIGINT)
    demo.stdout.read()
    assert demo.wait(60) == 130
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and int(status.parent.name) != os.getpid():
            found.append(int(status.parent.name))
    return found
