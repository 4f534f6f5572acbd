"""The other side of a simulation: the edge service, and what processes use."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from models.rss import rss
from protocol.errors import LinkError
from protocol.topics import Cluster
from server.edge.folder import DATABASE
from server.edge.overview import order, overview
from tools.processes import Child

_NEVER = 1e7  # seconds


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
        return cls((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), rss(process, peak=True) / 1e6)


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
