"""`skerry coordinator`: brings together what the clusters of a fleet learned."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import click

from protocol.folder_lock import holder
from protocol.rounds import Whole
from server.coordinator.config import CoordinatorConfig, assemble, cluster_names, state_folder
from server.coordinator.store import LOCK, Kept, read
from tools.settings import configuration

_VARIABLES = {
    "fleet": "SKERRY_COORDINATOR_FLEET",
    "folder": "SKERRY_COORDINATOR_FOLDER",
    "cluster": "SKERRY_CLUSTERS_BROKERS",
    "groups": "SKERRY_GROUPS_BY",
}


@click.group(invoke_without_command=True)
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="TOML file; else coordinator.toml in your folder."
)
@click.option("--fleet", help="The fleet whose clusters are brought together.")
@click.option("--cluster", multiple=True, help="A cluster and where it is reached: A=mqtt://host:1883.")
@click.option("--groups", type=click.Choice(["declared", "similarity"]), help="What devices are brought together by.")
@click.option("--folder", type=click.Path(), help="Folder of its state.")
@click.pass_context
def coordinator(context: click.Context, /, path: Path | None, **options: Any) -> None:
    """Bring together what the clusters of a fleet learned about when to ask, and tell all of them.

    It needs nothing but a connection to their brokers, or to one broker that bridges them. Without it each cluster
    goes on with what it was told last.

    \b
    Examples:
      skerry coordinator --cluster A=mqtt://10.0.0.1:1883 --cluster B=mqtt://10.0.0.2:1883
      skerry coordinator --config coordinator.toml
      skerry coordinator status
    """
    config = configuration(CoordinatorConfig, "coordinator", path, _variables(options))
    context.obj = config
    if context.invoked_subcommand is None:
        _serve(config)


@coordinator.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_obj
def status(config: CoordinatorConfig, as_json: bool) -> None:
    """Show the clusters, how old their last reports are, and what holds for all.

    The coordinator may be running: it is what it has saved, half a minute ago at most.

    \b
    Example:
      skerry coordinator status --json
    """
    folder = state_folder(config)
    found = _overview(config, folder, read(folder))
    click.echo(json.dumps(found, indent=2) if as_json else _text(found))


def _serve(config: CoordinatorConfig) -> None:
    logging.basicConfig(level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    service = assemble(config)
    service.start()
    try:
        names = ", ".join(cluster_names(config))
        click.echo(f"skerry coordinator: serving fleet {config.coordinator.fleet}, clusters {names}")
        stop.wait()
    finally:
        service.close()


def _overview(config: CoordinatorConfig, folder: Path, kept: Kept) -> dict[str, Any]:
    clusters: list[dict[str, Any]] = []
    for name in sorted({*cluster_names(config), *kept.heard}):
        heard = kept.heard.get(name)
        age = kept.seconds - heard.at if heard else None
        clusters.append(
            {
                "cluster": name,
                "number": heard.report.number if heard else None,
                "age_s": None if age is None else round(max(age, 0.0), 1),
                "counts": age is not None and age <= config.coordinator.silence_s,
                "subjects": sorted(heard.report.subjects) if heard else [],
            }
        )
    return {
        "fleet": config.coordinator.fleet,
        "folder": str(folder),
        "running": holder(folder, LOCK) is not None,
        "number": kept.overall.number,
        "clusters": clusters,
        "subjects": [_whole(subject, whole) for subject, whole in sorted(kept.overall.subjects.items())],
    }


def _whole(subject: str, whole: Whole) -> dict[str, Any]:
    def level(one: Any) -> dict[str, Any]:
        return {"threshold": one.threshold, "evidence": one.evidence, "devices": one.devices}

    groups = [{**level(group), "centre": group.centre} for group in whole.groups]
    return {"subject": subject, **level(whole.level), "groups": groups}


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"fleet      {found['fleet']}, {'running' if found['running'] else 'not running'}, {found['folder']}",
        f"overall    {found['number'] or 'nothing published yet'}",
    ]
    for each in found["clusters"]:
        said = f"report {each['number']}, {each['age_s']:.0f} s ago" if each["number"] is not None else "no report yet"
        lines.append(f"cluster    {each['cluster']}: {said}{'' if each['counts'] else ', counts not'}")
    for each in found["subjects"]:
        lines.append(f"subject    {each['subject']}: {_level(each)}")
        lines += [f"  group {at}  {_level(group)}" for at, group in enumerate(each["groups"])]
    return "\n".join(lines)


def _level(each: dict[str, Any]) -> str:
    return f"threshold {each['threshold']:.3f}, evidence {each['evidence']:.0f}, {each['devices']} devices"


def _variables(options: dict[str, Any]) -> dict[str, str]:
    """The command line over file and environment: an option stands for the environment variable of its key."""
    options["cluster"] = ",".join(options["cluster"]) or None
    given = {_VARIABLES[name]: str(value) for name, value in options.items() if value is not None}
    return {**os.environ, **given}
