"""`skerry edge`: the edge service of one cluster, and its rounds."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from protocol.errors import RequestError
from protocol.folder_lock import holder
from server.edge.adapter_overview import adapter_overview, adapters_of
from server.edge.config import EdgeConfig, assemble, edge_folder
from server.edge.epsilon import spending
from server.edge.folder import LOCK
from server.edge.overview import Overview, has_rounds, noisy_releases, order, overview, past, waiting_orders
from tools import edge_rounds
from tools.edge_adapters import adapters_json, adapters_text
from tools.edge_rounds import doing, refused, rounds_json
from tools.settings import configuration

_VARIABLES = {
    "fleet": "SKERRY_EDGE_FLEET",
    "cluster": "SKERRY_EDGE_CLUSTER",
    "broker": "SKERRY_BROKER_URL",
    "neighbour": "SKERRY_NEIGHBOURS_BROKERS",
    "hops": "SKERRY_EDGE_HOPS",
}
_DONE_SECONDS = 5.0  # in which an edge that is connected does what it is told
_LOOK_SECONDS = 0.1
_SHOWN = 20  # devices and history entries

of_adapters = click.option("--adapters", is_flag=True, help="Rounds of adapters instead of thresholds.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(invoke_without_command=True)
@click.option("--config", "path", type=click.Path(path_type=Path), help="TOML file; else edge.toml in your folder.")
@click.option("--fleet", help="The fleet that the cluster belongs to.")
@click.option("--cluster", help="The cluster that this edge serves.")
@click.option("--broker", help="Its MQTT broker, mqtt://host:1883 or mqtts://host:8883.")
@click.option("--neighbour", multiple=True, help="A cluster to ask and its broker: B=mqtt://host:1883.")
@click.option("--hops", type=click.IntRange(0), help="Clusters that a question may cross from here.")
@click.pass_context
def edge(context: click.Context, /, path: Path | None, **options: Any) -> None:
    """Run a cluster's edge service: it tells the devices whom they can reach, asks neighbouring clusters for them, and
    averages what the devices have learned.

    Each cluster has its own broker and its own edge; two edges that are to ask each other name each other's broker.
    With a COMMAND: look at its rounds and steer them, while it runs or not. Options come before the command.

    \b
    Examples:
      skerry edge --cluster A --broker mqtt://127.0.0.1:1883 --neighbour B=mqtt://10.0.0.2:1883
      skerry edge --config edge.toml
      skerry edge --cluster A status
    """
    config = configuration(EdgeConfig, "edge", path, _variables(options))
    if context.invoked_subcommand is not None:
        context.obj = edge_folder(config)
        return
    logging.basicConfig(level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    running = assemble(config)
    running.start()
    try:
        click.echo(f"skerry edge: serving cluster {config.edge.cluster} at {config.broker.url}")
        stop.wait()
    finally:
        running.close()


@edge.command()
@as_json
@click.pass_obj
def status(folder: Path, as_json: bool) -> None:
    """Show rounds, what is agreed, who was refused and why, and the history; of adapters too, if it aggregates them.

    \b
    Example:
      skerry edge status --json
    """
    adapters = adapter_overview(folder) if has_rounds(adapters_of(folder)) else None
    found = overview(folder) if adapters is None or has_rounds(folder) else None
    if as_json:
        told = _json(folder, found) if found else {"folder": str(folder)}
        click.echo(json.dumps(told | ({"adapters": adapters_json(adapters)} if adapters else {}), indent=2))
        return
    if found:
        click.echo(_text(folder, found))
    if adapters:
        click.echo(adapters_text(adapters))


@edge.command()
@click.option(
    "--to", "number", type=click.IntRange(1), help="A number of the history; else the one before the present."
)
@click.option("--hold", is_flag=True, help="Begin no new round until `skerry edge resume`.")
@of_adapters
@click.pass_obj
def rollback(folder: Path, number: int | None, hold: bool, adapters: bool) -> None:
    """Publish what was agreed earlier again, under a new number.

    \b
    Examples:
      skerry edge rollback --to 12 --hold
      skerry edge rollback --adapters
    """
    history = adapter_overview(folder).history if adapters else overview(folder).history
    folder = adapters_of(folder) if adapters else folder
    target = past(history, number).number
    kinds = ["hold", "rollback"] if hold else ["rollback"]
    _obeyed(folder, order(folder, *kinds, number=target), f"what was agreed as number {target} is published again")


@edge.command()
@of_adapters
@click.pass_obj
def resume(folder: Path, adapters: bool) -> None:
    """Begin new rounds again after `rollback --hold`.

    \b
    Example:
      skerry edge resume
    """
    folder = adapters_of(folder) if adapters else folder
    _obeyed(folder, order(folder, "resume"), "rounds go on")


@edge.command(name="round")
@of_adapters
@click.pass_obj
def round_(folder: Path, adapters: bool) -> None:
    """Begin a round now instead of at its time.

    \b
    Examples:
      skerry edge round
      skerry edge round --adapters
    """
    found = adapter_overview(folder) if adapters else overview(folder)
    folder = adapters_of(folder) if adapters else folder
    if found.state.held:
        raise RequestError("rounds are held: `skerry edge resume` begins them again")
    if found.state.collecting:
        raise RequestError(f"round {found.state.round} is under way: wait for its end")
    _obeyed(folder, order(folder, "round"), "a round begins")


@edge.command()
@click.option(
    "--delta",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    default=1e-5,
    show_default=True,
    help="Which epsilon is counted at; below 1 / devices.",
)
@as_json
@click.pass_obj
def privacy(folder: Path, delta: float, as_json: bool) -> None:
    """Show how much privacy the devices have spent in rounds, by the noise that they say they added.

    \b
    Example:
      skerry edge privacy --delta 1e-6 --json
    """
    kept = [each for each in (folder, adapters_of(folder)) if has_rounds(each)] or [folder]
    spent = spending([release for each in kept for release in noisy_releases(each)], delta)
    worst = (spent.worst[0] or "others", spent.worst[1]) if spent.worst else ("", 0.0)
    found = {
        "delta": delta,
        "devices": spent.devices,
        "without_noise": spent.unprotected,
        "worst_device": worst[0],
        "worst_epsilon": _finite(worst[1]),
        "epsilon": {f"{share:.0%}": _finite(epsilon) for share, epsilon in spent.quantiles.items()},
    }
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{spent.devices:,} devices, {spent.unprotected:,} of them have sent what they learned without noise")
    if spent.worst is not None:
        click.echo(f"epsilon at delta {delta:g}: {worst[1]:.3g} at most ({worst[0]})")
        click.echo(
            "".join(f"  {share:.0%} of the devices: {each:.3g}\n" for share, each in spent.quantiles.items()), nl=False
        )


def _finite(epsilon: float) -> float | None:
    """JSON knows no infinity; None: no bound."""
    return round(epsilon, 4) if math.isfinite(epsilon) else None


def _obeyed(folder: Path, ids: Sequence[int], what: str) -> None:
    """Waits for a running edge to do it; says when it will be done, if it is not."""
    end = time.monotonic() + _DONE_SECONDS
    while (process := holder(folder, LOCK)) is not None and time.monotonic() < end:
        if not any(waiting in ids for waiting in waiting_orders(folder)):
            click.echo(what)
            return
        time.sleep(_LOOK_SECONDS)
    when = "is connected to its broker" if process is not None else "runs"
    click.echo(f"{what}, as soon as the edge {when}")


def _variables(options: dict[str, Any]) -> dict[str, str]:
    """The command line over file and environment: an option stands for the environment variable of its key."""
    options["neighbour"] = ",".join(options["neighbour"]) or None
    given = {_VARIABLES[name]: str(value) for name, value in options.items() if value is not None}
    return {**os.environ, **given}


def _json(folder: Path, found: Overview) -> dict[str, Any]:
    return rounds_json(found) | {
        "folder": str(folder),
        "process": found.process,
        "overall": found.overall,
        "devices": {"known": found.devices, "lately": found.lately, "waiting": found.waiting},
        "subjects": [
            {
                "subject": subject,
                "threshold": round(kept.told.level.threshold, 6),
                "evidence": round(kept.told.level.evidence, 2),
                "devices": kept.told.level.devices,
                "round": kept.round,
            }
            for subject, kept in found.subjects.items()
        ],
    }


def _text(folder: Path, found: Overview) -> str:
    state = found.state
    process = f"process {found.process}" if found.process is not None else "not running"
    lines = [
        f"{folder}: {process}",
        f"round {state.round}, {doing(found)}; number {state.number}, overall {found.overall or 'none'}",
        f"devices: {found.devices:,} known, {found.lately:,} lately, {found.waiting:,} wait to be counted",
    ]
    lines += [f"{'SUBJECT':18}{'THRESHOLD':>10}{'EVIDENCE':>12}{'DEVICES':>9}{'ROUND':>8}"] if found.subjects else []
    for subject, kept in found.subjects.items():
        of = kept.told.level
        lines.append(f"{subject:18}{of.threshold:>10.4f}{of.evidence:>12,.1f}{of.devices:>9,}{kept.round:>8}")
    lines += refused(found)
    worst = sorted(found.refusals.items(), key=lambda item: -sum(item[1].values()))
    for device, of_device in worst[:_SHOWN]:
        lines.append(f"  {device or 'others'}: " + ", ".join(f"{n:,} {reason}" for reason, n in of_device.items()))
    return "\n".join(lines + edge_rounds.past(found, _SHOWN))
