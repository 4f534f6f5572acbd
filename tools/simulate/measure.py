"""Rounds of a simulated fleet, and what they cost."""

from __future__ import annotations

import math
import resource
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from protocol.errors import ConfigError
from protocol.topics import Cluster
from protocol.transport.mqtt import MqttOptions
from tools.mosquitto import mosquitto
from tools.simulate.device import SUBJECT
from tools.simulate.fleet import Fleet, Say
from tools.simulate.member import Plan
from tools.simulate.servers import EdgeProcess, Usage

_OTHER_FILES = 100  # that a process has open, beside its connections
_STILL = 0.01  # a move of the agreed threshold that is none
_ELSEWHERE = ("duplicate", "implausible")  # refused, and accepted too: counted once


@dataclass(slots=True)
class Run:
    """What one fleet did. Per round: `seconds` from the Call's to the Agreed's first arrival at a device; `reached`,
    until all devices present had that; `counted`, devices in the aggregate; `agreed`, the threshold; `off`, the mean
    distance of the honest devices' thresholds from their own best ones. `off_start`, `off_alone`: before anything was
    learned, and by their own data alone. CPU seconds are those of the rounds, `bytes` and `wire` those of everything
    between the first Call and the end."""

    plan: Plan
    seconds: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    off_start: float = 0.0
    off_alone: float = 0.0
    edge_cpu: float = 0.0
    broker_cpu: float = 0.0
    edge_mb: float = 0.0
    bytes: int = 0
    wire: int = 0
    acknowledged: int = 0
    sent: int = 0
    cuts: int = 0
    lost: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def each(self, total: float) -> float:
        """Per device and round."""
        return total / (self.plan.devices * self.plan.rounds)

    @property
    def settled(self) -> int | None:
        """The first round whose result no later one moved; None: the last one still did."""
        last = self.agreed[-1]
        moved = [at for at, threshold in enumerate(self.agreed[:-1], 1) if abs(threshold - last) > _STILL]
        first = max(moved, default=0) + 1
        return first if first < len(self.agreed) else None


def simulate(plan: Plan, broker: str | None, scaling: bool, say: Say) -> dict[str, Any]:
    """The object of `skerry simulate --json`. `broker`: the URL of one that runs; None: a Mosquitto of its own.
    `scaling`: a fleet of a tenth goes before, to compare. Raises LinkError, ConfigError.

    `bytes`: PUBLISH packets between devices and broker, both ways: calls, updates, results, and what is sent again.
    `wire_bytes` (Linux): what the kernel counted on these connections, so with acknowledgements, reconnections and
    headers of TCP and IP. In neither: the edge's own connection, over which each update goes once more. `lost_updates`:
    of updates that the broker acknowledged to the device, those that the edge neither accepted nor refused.
    """
    _allow_files(plan.devices)
    small = _run(replace(plan, devices=plan.devices // 10), broker, say) if scaling else None
    return _result(_run(plan, broker, say), small)


def _allow_files(devices: int) -> None:
    """As many open files as connections, here and in the broker, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = devices + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{devices} connections need as many open files, and this system allows {hard}: raise the limit "
            f"(`ulimit -Hn {needed}` as root), or simulate fewer devices"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def _broker(given: str | None, folder: Path) -> Iterator[tuple[str, int | None]]:
    """Its URL, and its process if that is known."""
    if given is not None:
        yield given, None
        return
    with mosquitto(folder) as (url, process):
        yield url, process


def _run(plan: Plan, given: str | None, say: Say) -> Run:
    name = f"{plan.devices} devices: "
    with TemporaryDirectory(prefix="skerry-simulate-") as folder, _broker(given, Path(folder)) as (url, process):
        host, port, tls = MqttOptions(url=url, client_id="").address()
        if tls:
            raise ConfigError("simulated devices speak plain MQTT: name a broker as mqtt://host:port")
        cluster = Cluster(f"simulated-{secrets.token_hex(4)}", "main")
        fleet = Fleet(plan, cluster, (host, port), lambda line: say(name + line))
        try:
            run = _Rounds(fleet, url, Path(folder), process).run()
            if given is not None:
                fleet.forget()
            return run
        finally:
            fleet.close()


class _Rounds:
    def __init__(self, fleet: Fleet, url: str, folder: Path, broker: int | None) -> None:
        self._fleet = fleet
        self._site = fleet.site
        self._url = url
        self._folder = folder
        self._broker = broker
        self._run = Run(fleet.plan)

    def run(self) -> Run:
        fleet, run = self._fleet, self._run
        fleet.connect()
        run.off_start = fleet.off()
        fleet.live()
        run.off_alone = fleet.off()
        fleet.scatter()
        edge = self._edge()
        fleet.alive = edge.check
        wire = fleet.loop.measured()
        try:
            for round in range(1, run.plan.rounds + 1):
                if round > 1:
                    fleet.scatter()
                    edge.call()
                self._round(round, edge)
                fleet.gather()
                if round < run.plan.rounds:
                    fleet.live()
                fleet.until(fleet.all_answered, f"those that were away come back to round {round}")
            run.edge_mb = Usage.of(edge.process).peak_mb
        finally:
            edge.stop()
        run.wire = fleet.loop.measured() - wire
        self._count(edge)
        return run

    def _edge(self) -> EdgeProcess:
        plan = self._run.plan
        return EdgeProcess(
            self._site.cluster,
            self._url,
            self._folder,
            devices=plan.present,
            collect=plan.patience,
            spread=plan.spread,
        )

    def _round(self, round: int, edge: EdgeProcess) -> None:
        fleet, site, run = self._fleet, self._site, self._run
        present = run.plan.present
        before = self._cpu(edge)
        fleet.until(lambda: round in site.called, f"round {round} begins")
        began = site.called[round]
        fleet.until(lambda: round in site.agreed, f"round {round}", lambda: f"{site.answers[round]} updates")
        ended, agreed = site.agreed[round]
        fleet.until(lambda: site.heard[round] >= present, f"the result of round {round} reaches the devices")
        after = self._cpu(edge)
        run.edge_cpu += after[0] - before[0]
        run.broker_cpu += after[1] - before[1]
        run.seconds.append(ended - began)
        run.reached.append(time.monotonic() - began)
        learned = agreed.subjects.get(SUBJECT)
        level = learned.cluster if learned else None
        run.counted.append(level.devices if level else 0)
        run.agreed.append(level.threshold if level else math.nan)
        run.off.append(fleet.off())

    def _cpu(self, edge: EdgeProcess) -> tuple[float, float]:
        return Usage.of(edge.process).cpu_seconds, Usage.of(self._broker).cpu_seconds if self._broker else 0.0

    def _count(self, edge: EdgeProcess) -> None:
        site, run = self._site, self._run
        known, refused = edge.accepted(), edge.refused()
        for device, reasons in refused.items():
            known[device] += sum(count for reason, count in reasons.items() if reason not in _ELSEWHERE)
            run.refused.update(reasons)
        run.lost = sum(max(0, rounds - known[device]) for device, rounds in site.acknowledged.items())
        run.acknowledged = site.acknowledged.total()
        run.bytes, run.sent, run.cuts = site.bytes, site.sent, site.cuts


def _result(run: Run, small: Run | None) -> dict[str, Any]:
    plan = run.plan
    return {
        "devices": plan.devices,
        "rounds": plan.rounds,
        "round_s": round(max(run.seconds), 2),
        "edge_rss_mb": round(run.edge_mb, 1),
        **_costs(run),
        "lost_updates": run.lost,
        "present": plan.present,
        "rounds_s": [round(seconds, 2) for seconds in run.seconds],
        "reached_s": [round(seconds, 2) for seconds in run.reached],
        "counted": run.counted,
        "updates_sent": run.sent,
        "updates_acknowledged": run.acknowledged,
        "refused": dict(sorted(run.refused.items())),
        "connections_cut": run.cuts,
        "agreed": [round(threshold, 4) for threshold in run.agreed],
        "rounds_to_convergence": run.settled,
        "off_start": round(run.off_start, 4),
        "off_alone": round(run.off_alone, 4),
        "off": [round(off, 4) for off in run.off],
        "plan": {name: getattr(plan, name) for name in ("away", "cut", "hostile", "spread", "delay", "seed")},
        "scaling": _scaling(small, run) if small else None,
    }


def _costs(run: Run) -> dict[str, float]:
    """Per device and round."""
    return {
        "bytes_per_device_round": round(run.each(run.bytes), 1),
        "wire_bytes_per_device_round": round(run.each(run.wire), 1),
        "cpu_ms_per_device_round": round(run.each(run.edge_cpu + run.broker_cpu) * 1e3, 4),
        "edge_cpu_ms_per_device_round": round(run.each(run.edge_cpu) * 1e3, 4),
    }


def _scaling(small: Run, large: Run) -> dict[str, Any]:
    one, other = _costs(small), _costs(large)
    return {
        "devices": [small.plan.devices, large.plan.devices],
        "lost_updates": small.lost,
        **{name: [value, other[name]] for name, value in one.items()},
        **{
            f"{name.partition('_per')[0]}_ratio": round(other[name] / (value or math.nan), 3)
            for name, value in one.items()
        },
    }
