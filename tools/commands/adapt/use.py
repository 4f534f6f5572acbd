"""`skerry adapt status`, `list`, `use` and `rollback`: what the device has learned, and what it uses of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import msgspec

from agent.adapt.lessons import lessons_of
from agent.adapt.service import Status, status_of
from agent.adapt.session import (
    INSTALL,
    NO_ADAPTERS,
    adapters_folder,
    check_takes_adapters,
    installed,
    takes_adapters,
    trainer,
    unlearned,
)
from agent.adapt.store import OWN, AdapterStore, Kept
from agent.config import AgentConfig
from models.adapter import check_fits, read, shapes_of
from models.fingerprint import fingerprint
from models.store import Places
from tools.commands.adapt.run import as_json, of_config, scored, shown
from tools.fetch import model_file
from tools.settings import configuration


@click.command(epilog="Example: skerry adapt status")
@of_config
@as_json
def status(config: Path | None, as_json: bool) -> None:
    """Show what is being trained, or why nothing is. The agent may be running."""
    settings, model, store = _opened(config)
    folder = adapters_folder(settings)
    process, told = trainer(folder), status_of(folder)
    with closing(lessons_of(settings, store.model)) as lessons:
        new, count = unlearned(folder, lessons), lessons.count
    if process is None and told.doing in ("training", "judging", "paused"):  # whoever did that is gone
        told = msgspec.structs.replace(told, doing="off", progress=None)
    facts: dict[str, Any] = msgspec.to_builtins(told)
    facts |= {"new": new, "enough": settings.adapt.lessons, "lessons": count, "process": process}
    facts |= {"takes_adapters": takes_adapters(model), "installed": installed()}
    facts |= {"in_use": store.state().slots, "number": store.state().number}
    click.echo(json.dumps(facts) if as_json else "\n".join(_told(told, facts)))


def _told(status: Status, facts: dict[str, Any]) -> Iterator[str]:
    if not facts["takes_adapters"]:
        yield f"training    off: {NO_ADAPTERS}"
        return
    yield f"training    {status.doing}" + (f": {status.waits}" if status.waits else "")
    if facts["process"] is not None:
        yield f"            by process {facts['process']}, slot {status.slot or OWN}"
    if status.progress is not None:
        yield f"            {shown(status.progress)}"
    yield f"lessons     {facts['lessons']}; {facts['new']} new, {facts['enough']} begin a training"
    for slot, id in sorted(facts["in_use"].items()):
        yield f"in use      {slot}: {id[:12]}"
    if not facts["in_use"]:
        yield "in use      none: the bare model"
    if status.last is not None and status.last.verdict is not None:
        yield f"last        {status.last.verdict.reason}{scored(status.last.verdict)}"
    if status.error:
        yield f"error       {status.error}"
    if not facts["installed"]:
        yield f"            {INSTALL}"


@click.command("list", epilog="Example: skerry adapt list --json")
@of_config
@as_json
def list_adapters(config: Path | None, as_json: bool) -> None:
    """List all adapters for the configured model, oldest first, with what the gate found."""
    _, model, store = _opened(config)
    slots = store.state().slots
    rows = [
        msgspec.to_builtins(kept)
        | {"slots": [slot for slot, id in slots.items() if id == kept.id], "there": store.path(kept.id).exists()}
        for kept in store.adapters()
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for kept, row in zip(store.adapters(), rows, strict=True):
        click.echo(_line(kept, row))
    if not rows:
        click.echo("none yet: `skerry adapt run --now` trains one" if takes_adapters(model) else f"none: {NO_ADAPTERS}")


def _line(kept: Kept, row: dict[str, Any]) -> str:
    state = ", ".join(row["slots"]) or ("dropped" if kept.dropped else "kept" if row["there"] else "removed")
    verdict = "" if kept.verdict is None else f"  {kept.verdict.reason}{scored(kept.verdict)}"
    private = ", private" if kept.private else ""
    return (
        f"v{kept.version:<3} {kept.id[:12]}  {state:<12} {kept.origin}{private}, rank {kept.rank}, "
        f"{kept.lessons} lessons{verdict}"
    )


@click.command(epilog="Example: skerry adapt use v3")
@click.argument("adapter")
@click.option("--slot", default=OWN, show_default=True, help="Where it is used.")
@of_config
@as_json
def use(adapter: str, slot: str, config: Path | None, as_json: bool) -> None:
    """Use ADAPTER: an id, the beginning of one, a version such as v3, or a GGUF file; `none` empties the slot. The
    gate is not asked. A running agent follows within seconds; `skerry adapt rollback` undoes it.

    \b
    Examples:
      skerry adapt use 3f2a
      skerry adapt use ./topics.gguf --slot own
      skerry adapt use none
    """
    _, model, store = _opened(config)
    check_takes_adapters(model)
    id = None if adapter == "none" else _chosen(adapter, model, store).id
    number = store.commit(slot, id, "chosen by hand")
    used = f"adapter {id[:12]} is used" if id else "no adapter is used"
    click.echo(json.dumps({"slot": slot, "id": id, "number": number}) if as_json else f"{used} in slot {slot}")


def _chosen(name: str, model: Path, store: AdapterStore) -> Kept:
    path = Path(name)
    if not (path.suffix == ".gguf" or path.is_file()):
        return store.find(name)
    check_fits(read(path), shapes_of(model))
    return store.add(path, "file", private=True)  # nobody knows what it was trained on, so it stays here


@click.command(epilog="Example: skerry adapt rollback")
@of_config
@as_json
def rollback(config: Path | None, as_json: bool) -> None:
    """Go back to the adapters that were in use before; again: to those before that. A running agent follows within
    seconds."""
    _, _, store = _opened(config)
    state = store.rollback()
    used = ", ".join(f"{slot}: {id[:12]}" for slot, id in sorted(state.slots.items())) or "the bare model"
    click.echo(json.dumps(msgspec.to_builtins(state)) if as_json else f"in use: {used}")


def _opened(config: Path | None) -> tuple[AgentConfig, Path, AdapterStore]:
    settings = configuration(AgentConfig, "agent", config, os.environ)
    model = model_file(settings.model.name, Places.of(os.environ))
    return settings, model, AdapterStore(adapters_folder(settings), fingerprint(model))
