"""The other side of a simulation: Mosquitto and the edge service, each a process, and what they use."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import LinkError
from protocol.topics import Cluster
from server.edge.folder import DATABASE
from server.edge.overview import order, overview
from tools.processes import Child

_READY_SECONDS = 30.0
_NEVER = 1e7  # seconds
_PATHS = ":/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"

# The defaults (20 under way, 1000 waiting) are too few for an edge that hears from all devices at once.
_CONFIG = """\
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 100000
max_queued_bytes 67108864
log_type error
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process, so far. Linux; elsewhere zeros."""

    cpu_seconds: float = 0.0
    peak_mb: float = 0.0

    @classmethod
    def of(cls, process: int) -> Usage:
        folder = Path("/proc", str(process))
        if not folder.exists():
            return cls()
        user, system = folder.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        peak = re.search(r"VmHWM:\s+(\d+) kB", folder.joinpath("status").read_text())
        return cls((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), int(peak[1]) * 1024 / 1e6 if peak else 0.0)


@contextmanager
def mosquitto(folder: Path) -> Iterator[tuple[str, int]]:
    """A broker of its own on a free loopback port: its URL and its process. Raises LinkError."""
    program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + _PATHS)
    if program is None:
        raise LinkError(
            "Mosquitto is not installed: `apt-get install mosquitto` (or `brew install mosquitto`), or name a broker "
            "that runs with --broker"
        )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    config = folder / "mosquitto.conf"
    config.write_text(_CONFIG.format(port=port))
    process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _await(lambda: process.poll() is None, port)
        yield f"mqtt://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def _await(lives: Callable[[], bool], port: int) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if not lives() or time.monotonic() > deadline:
                raise LinkError("Mosquitto does not start: try `mosquitto -v`") from None
            time.sleep(0.02)


class EdgeProcess:
    """`skerry edge`, which calls its first round as soon as it is connected, and the next ones on demand. A round ends
    when `devices` have answered, or after `collect` seconds."""

    def __init__(
        self, cluster: Cluster, url: str, folder: Path, *, devices: int, collect: float, spread: float
    ) -> None:
        self._folder = folder
        config = folder / "edge.toml"
        config.write_text(
            f'[edge]\nfleet = "{cluster.fleet}"\ncluster = "{cluster.name}"\nfolder = "{folder}"\n'
            f'[broker]\nurl = "{url}"\n'
            f"[rounds]\nevery = {_NEVER}\ncollect = {collect}\nspread = {spread}\ndevices = {devices}\nshare = 0.0\n"
        )
        self._child = Child(["edge", "--config", str(config)])
        try:
            self._child.wait_for("serving cluster")
        except BaseException:
            self._child.stop()
            raise

    @property
    def process(self) -> int:
        return self._child.process.pid

    def check(self) -> None:
        """Raises LinkError if it has ended."""
        if self._child.process.poll() is not None:
            raise LinkError("the edge service ended in the middle of the simulation: run `skerry edge` to see why")

    def call(self) -> None:
        """Orders the next round."""
        order(self._folder, "round")

    def stop(self) -> None:
        self._child.stop()

    def accepted(self) -> Counter[str]:
        """How many updates of each device it took, late ones too. Once it has stopped."""
        with closing(sqlite3.connect(self._folder / DATABASE)) as db:
            return Counter(dict(db.execute("SELECT device, sum(accepted) FROM updates GROUP BY device")))

    def refused(self) -> dict[str, dict[str, int]]:
        """By device and reason. Once it has stopped."""
        return overview(self._folder).refusals
