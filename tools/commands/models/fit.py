"""`skerry models fit`: which model, with which settings, this device or a known board should run."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from agent.config import AgentConfig, device_folder
from agent.doctor.machine import read_machine
from models import latency
from models.boards import BOARDS, memory_speed, processor, repacks
from models.catalog import Catalog
from models.engine.open import EngineOptions, kind_of, open_engine
from models.engine.threads import physical_cores
from models.fingerprint import fingerprint
from models.fit import Budget, Candidate, Choice, fit, nearest, needed, toml
from models.footprint import guessed_shape, read_shape
from models.gguf_header import read_header
from models.latency import DecodePoint, DecodeTable
from models.store import Places, resolve_model, state
from protocol.errors import BadModelFile
from tools.commands.models.stored import as_json
from tools.settings import configuration

_MB = 10**6


@dataclass(frozen=True, slots=True)
class _Found:
    """A candidate, and where its file is if it is here."""

    candidate: Candidate
    path: Path | None


@dataclass(frozen=True, slots=True)
class _Target:
    """What a model has to fit. `memory`: bytes that are free there."""

    name: str
    memory: int
    here: bool


@click.command(name="fit")
@click.option("--board", type=click.Choice(["this", *BOARDS]), default="this", show_default=True, help="The device.")
@click.option("--memory", type=click.IntRange(1), help="MB that the agent may take. [default: what is free]")
@click.option("--tok-s", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Least speed to write at.")
@click.option("--context", type=click.IntRange(128), default=4096, show_default=True, help="Least tokens of context.")
@click.option("--model", "names", multiple=True, metavar="ID|PATH", help="Only these. [default: the catalog]")
@click.option("--again", is_flag=True, help="Measure also what was measured before.")
@click.option("--config", type=click.Path(path_type=Path), help="The agent's TOML file: device.folder, model.threads.")
@as_json
def fit_models(
    board: str,
    memory: int | None,
    tok_s: float,
    context: int,
    names: tuple[str, ...],
    again: bool,
    config: Path | None,
    as_json: bool,
) -> None:
    """Say which model and settings a device should take, and why not the others.

    On this device it measures the models that are here, once, and keeps how fast they write by length of context:
    `skerry doctor` reads it. All other figures are estimates, and marked as such. The exit code is 1 if none fits.

    \b
    Example:
      skerry models fit --tok-s 10 --context 2048
      skerry models fit --board pi5 --memory 2000
    """
    settings = configuration(AgentConfig, "agent", config, os.environ)
    target = _target(board, memory)
    budget = Budget(target.memory, tok_s, context)
    found = _candidates(names, Places.of(os.environ))
    if target.here:
        folder, threads = device_folder(settings), settings.model.threads or physical_cores()
        found = [_measured(one, budget, folder, threads, again) for one in found]
        speed, repack = memory_speed(time.perf_counter, physical_cores()), repacks()
    else:
        speed, repack = BOARDS[board].speed, BOARDS[board].repack
    choices = fit([one.candidate for one in found], budget, speed, repack)
    taken = next((choice for choice in choices if choice.fits), None)
    if as_json:
        click.echo(json.dumps(_report(target, budget, choices, taken), indent=2))
    else:
        _show(target, budget, choices, taken)
    if taken is None:
        sys.exit(1)


def _target(board: str, memory: int | None) -> _Target:
    if board != "this":
        free = BOARDS[board].free_mb
        return _Target(f"{board} ({free:,} MB left by its system)", (memory or free) * _MB, here=False)
    machine = read_machine(Path("/"), platform.machine(), physical_cores())
    if memory is None and machine.available is None:
        raise click.UsageError("the system does not tell how much memory is free: give --memory")
    free_bytes = memory * _MB if memory else machine.available or 0
    return _Target(f"this device ({machine.board}, {processor()}, {machine.cores} cores)", free_bytes, here=True)


def _candidates(names: tuple[str, ...], places: Places) -> list[_Found]:
    """Raises UnknownModel, BadModelFile, UnsafePath."""
    catalog = Catalog(places.entries)
    wanted = list(dict.fromkeys(names)) or [listed.entry.id for listed in catalog]
    return [_found(name, catalog, places) for name in wanted]


def _found(name: str, catalog: Catalog, places: Places) -> _Found:
    if name in catalog:
        entry = catalog.find(name).entry
        if state(entry, places.models) not in ("verified", "unverified"):
            return _Found(Candidate(name, guessed_shape(entry), entry.quantisation), None)
        path = resolve_model(name, places)
    else:
        path = resolve_model(name, places)
        name = str(path.absolute())
    quantisation = read_header(path).quantisation if kind_of(path) == "gguf" else ""
    return _Found(Candidate(name, read_shape(path), quantisation), path)


def _measured(found: _Found, budget: Budget, folder: Path, threads: int, again: bool) -> _Found:
    """With its table: the one that is kept, or one that is made now. What has no room is not loaded."""
    if found.path is None or needed(found.candidate, budget) > budget.memory:
        return found
    try:
        table = None if again else latency.load(folder, fingerprint(found.path), threads)
    except OSError as error:
        raise BadModelFile(f"{found.path}: cannot be read: {error.strerror}") from None
    if table is None:
        table = _measure(found, budget, threads)
        click.echo(f"{found.candidate.name}: written to {latency.save(folder, table)}", err=True)
    return replace(found, candidate=replace(found.candidate, table=table))


def _measure(found: _Found, budget: Budget, threads: int) -> DecodeTable:
    assert found.path is not None

    def tell(point: DecodePoint) -> None:
        rates = f"writes {point.decode_tok_s:.1f} tok/s, read {point.prefill_tok_s:.1f} tok/s"
        click.echo(f"{found.candidate.name}: after {point.context} tokens: {rates}", err=True)

    click.echo(f"{found.candidate.name}: measuring", err=True)
    context = min(budget.context, found.candidate.shape.context)
    engine = open_engine(found.path, EngineOptions(context=context, sequences=1, threads=threads, hidden=False))
    try:
        points = latency.measure(engine, latency.lengths(engine.context), time.perf_counter, tell)
        return DecodeTable(
            model=engine.info.fingerprint,
            engine=kind_of(found.path),
            cpu=processor(),
            threads=threads,
            points=points,
            measured_at=time.time(),
        )
    finally:
        engine.close()


def _report(target: _Target, budget: Budget, choices: list[Choice], taken: Choice | None) -> dict[str, Any]:
    near = taken or nearest(choices)
    return {
        "device": target.name,
        "memory_mb": budget.memory // _MB,
        "tok_s": budget.tok_s,
        "context": budget.context,
        "taken": taken.candidate.name if taken else None,
        "settings": asdict(near.settings) if taken else None,
        "nearest": None if taken else {"model": near.candidate.name, "changes": list(near.changes)},
        "models": [_row(choice) for choice in choices],
    }


def _row(choice: Choice) -> dict[str, Any]:
    table = choice.candidate.table
    return {
        "model": choice.candidate.name,
        "fits": choice.fits,
        "problems": list(choice.problems),
        "memory_mb": choice.memory // _MB,
        "tok_s": round(choice.tok_s, 2),
        "speed": "measured" if choice.measured else "estimated",
        "points": [] if table is None else [[point.context, round(point.decode_tok_s, 2)] for point in table.points],
        "settings": asdict(choice.settings),
    }


def _show(target: _Target, budget: Budget, choices: list[Choice], taken: Choice | None) -> None:
    memory = f"{budget.memory // _MB:,} MB"
    click.echo(f"{target.name}: {memory}, at least {budget.tok_s:g} tok/s with {budget.context} tokens of context\n")
    width = max(5, *(len(choice.candidate.name) for choice in choices))
    click.echo(f"{'MODEL':{width}}  {'MEMORY':>9}  {'TOK/S':>7}")
    for choice in choices:
        how = "measured" if choice.measured else "estimated"
        verdict = "take this" if choice is taken else "; ".join(choice.problems) or "fits, but is a lesser model"
        click.echo(
            f"{choice.candidate.name:{width}}  {choice.memory // _MB:>6,} MB  {choice.tok_s:>7.1f}  {how:9}  {verdict}"
        )
    if taken is not None:
        click.echo(f"\n{toml(taken)}")
        return
    near = nearest(choices)
    click.echo(f"\nNone fits. The nearest is {near.candidate.name}: it would with {' and '.join(near.changes)}.")
