"""`skerry memory`: what the device has learned, and moving or forgetting it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from agent.config import AgentConfig, device_folder
from agent.memory.memory import EntryMemory
from agent.memory.memory_overview import Overview, database, overview
from agent.memory.memory_portable import export as write_export
from protocol.memory import ORIGIN_BYTES, SPACE_BYTES, check_entry
from tools.settings import configuration

_DAY = 86_400.0

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
of_folder = click.option(
    "--folder", type=click.Path(path_type=Path), help="The memory's folder. [default: where `skerry agent` keeps it]"
)
of_config = click.option("--config", type=click.Path(path_type=Path), help="The agent's configuration file.")


def _name_of(size: int) -> Callable[[click.Context, click.Parameter, str | None], bytes | None]:
    """Reads the hex digits of a space or an origin."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> bytes | None:
        if value is None:
            return None
        with contextlib.suppress(ValueError):
            if len(named := bytes.fromhex(value)) == size:
                return named
        raise click.BadParameter(f"{value!r} is not {2 * size} hex digits, as `skerry memory stats` shows them")

    return read


@click.group(name="memory", epilog="Example: skerry memory stats")
def memory() -> None:
    """What the device has learned: look at it, export, import and clear it."""


@memory.command()
@of_folder
@of_config
@as_json
def stats(folder: Path | None, config: Path | None, as_json: bool) -> None:
    """Show how much is known, of which spaces, and from whom. The agent may be running.

    \b
    Example:
      skerry memory stats --json
    """
    where, _ = _place(folder, config)
    found = overview(where)
    click.echo(json.dumps(_json(where, found), indent=2) if as_json else _text(where, found))


@memory.command()
@click.argument("file", type=click.Path(path_type=Path))
@of_folder
@of_config
@as_json
def export(file: Path, folder: Path | None, config: Path | None, as_json: bool) -> None:
    """Write all entries to FILE, one JSON line each, as their devices signed them. The agent may be running.

    \b
    Example:
      skerry memory export memory.jsonl
    """
    where, _ = _place(folder, config)
    count = write_export(database(where), file)
    click.echo(json.dumps({"file": str(file), "entries": count}) if as_json else f"{count} entries in {file}")


@memory.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@of_folder
@of_config
@as_json
def import_(file: Path, folder: Path | None, config: Path | None, as_json: bool) -> None:
    """Add the entries of an exported FILE. The agent must be stopped.

    Entries whose signature does not fit are refused, and counted; the others are added.

    \b
    Example:
      skerry memory import memory.jsonl
    """
    with _opened(folder, config) as opened:
        done = opened.import_(file, lambda entry: check_entry(entry) is None)
    if as_json:
        click.echo(json.dumps({"file": str(file), "new": done.new, "known": done.known, "refused": done.refused}))
    else:
        click.echo(f"{done.new} new entries, {done.known} that were known or unwanted, {done.refused} refused")


@memory.command()
@click.option("--space", metavar="HEX", callback=_name_of(SPACE_BYTES), help="Forget the entries of this space.")
@click.option(
    "--origin",
    metavar="HEX",
    callback=_name_of(ORIGIN_BYTES),
    help="Forget this device's entries and record; ends a quarantine.",
)
@click.option("--all", "everything", is_flag=True, help="Forget all entries.")
@of_folder
@of_config
@as_json
def clear(
    space: bytes | None,
    origin: bytes | None,
    everything: bool,
    folder: Path | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Forget entries for good: nothing of them stays on the disk. The agent must be stopped.

    \b
    Example:
      skerry memory clear --all
    """
    if sum((space is not None, origin is not None, everything)) != 1:
        raise click.UsageError("give exactly one of --space, --origin and --all")
    with _opened(folder, config) as opened:
        gone = opened.clear(space=space, origin=origin)
    click.echo(json.dumps({"cleared": gone}) if as_json else f"{gone} entries forgotten")


def _place(folder: Path | None, config: Path | None) -> tuple[Path, AgentConfig]:
    """The memory's folder, and the configuration that bounds it."""
    agent = configuration(AgentConfig, "agent", config, os.environ)
    return folder.expanduser() if folder else device_folder(agent) / "memory", agent


def _opened(folder: Path | None, config: Path | None) -> EntryMemory:
    where, agent = _place(folder, config)
    return EntryMemory(where, max_bytes=agent.memory.megabytes * 10**6, max_age=agent.memory.days * _DAY)


def _json(folder: Path, found: Overview) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "process": found.process,
        "entries": found.entries,
        "disk_bytes": found.disk_bytes,
        "age_s": round(found.age_s),
        "spaces": [
            {"space": of.space.hex(), "width": of.width, "entries": of.entries, "segments": of.segments}
            for of in found.spaces
        ],
        "origins": [
            {
                "origin": of.origin.hex(),
                "entries": of.entries,
                "audits": round(of.audits, 2),
                "wrong": round(of.wrong, 2),
                "quarantined": of.quarantined,
                "dropped": of.dropped,
            }
            for of in found.origins
        ],
    }


def _text(folder: Path, found: Overview) -> str:
    used = f"in use by process {found.process}" if found.process is not None else "not in use"
    lines = [f"{folder}: {found.entries:,} entries, {found.disk_bytes / 1e6:,.1f} MB, {used}"]
    lines += [f"{'SPACE':34}{'DIMENSIONS':>10}{'ENTRIES':>10}{'SEGMENTS':>10}"] if found.spaces else []
    lines += [f"{of.space.hex():34}{of.width:>10}{of.entries:>10,}{of.segments:>10}" for of in found.spaces]
    lines += [f"{'ORIGIN':66}{'ENTRIES':>8}{'AUDITS':>8}{'WRONG':>8}"] if found.origins else []
    for of in found.origins:
        note = f"  quarantined, {of.dropped:,} entries dropped" if of.quarantined else ""
        lines.append(f"{of.origin.hex():66}{of.entries:>8,}{of.audits:>8.1f}{of.wrong:>8.1f}{note}")
    return "\n".join(lines)
