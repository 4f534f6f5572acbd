"""`skerry adapt run`: a training in the foreground."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from agent.adapt.idle import Machine
from agent.adapt.job import Progress, Scores, Verdict
from agent.adapt.lessons import lessons_of
from agent.adapt.session import (
    Outcome,
    Session,
    adapters_folder,
    check_takes_adapters,
    limits_of,
    recipe_of,
    unlearned,
)
from agent.adapt.store import AdapterStore
from agent.adapt.supervise import Supervisor
from agent.config import AgentConfig
from models.fingerprint import fingerprint
from models.store import Places
from protocol.errors import StoreInUse, TrainingError
from tools.fetch import model_file
from tools.settings import configuration

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
of_config = click.option("--config", type=click.Path(path_type=Path), help="The agent's configuration file.")

_LOOK_S = 5.0
_STAGES = {"load": "loading the model", "train": "training", "write": "writing", "judge": "judging"}


@click.command(epilog="Example: skerry adapt run --now")
@click.option("--now", is_flag=True, help="Also with few new lessons, hot, on battery, or beside other work.")
@of_config
@as_json
def run(now: bool, config: Path | None, as_json: bool) -> None:
    """Train now, in the foreground, and use what passes the gate. It needs the extra `train`, and no agent that is
    training meanwhile; Ctrl-C ends it, and the next run goes on where it was. A running agent uses the new adapter
    within seconds."""
    settings = configuration(AgentConfig, "agent", config, os.environ)
    model = model_file(settings.model.name, Places.of(os.environ))
    check_takes_adapters(model)
    folder = adapters_folder(settings)
    said = _Said(time.monotonic)
    supervisor = Supervisor(said)
    store = AdapterStore(folder, fingerprint(model))
    with closing(lessons_of(settings, store.model)) as lessons:
        new = unlearned(folder, lessons)
        if not now and new < settings.adapt.lessons:
            raise TrainingError(
                f"{new} lessons came since the last training, {settings.adapt.lessons} begin one (adapt.lessons): "
                "`skerry adapt run --now` trains all the same"
            )
        outcomes, recipe = [], recipe_of(settings.adapt)
        with closing(_session(folder, model, store, supervisor, settings)) as session:
            machine = Machine(Path("/"), settings.adapt.celsius, settings.adapt.busy)
            with _paused_when(None if now else machine, supervisor, said.line):
                for outcome in session.learn_all(lessons, recipe, lambda slot: said.line(f"slot {slot}")):
                    said.line(told(outcome))
                    outcomes.append(outcome)
        if not outcomes:
            raise TrainingError("too few lessons to train and to judge by: `skerry adapt add` adds examples")
    if as_json:
        click.echo(json.dumps([facts(outcome) for outcome in outcomes]))


def _session(folder: Path, model: Path, store: AdapterStore, supervisor: Supervisor, settings: AgentConfig) -> Session:
    try:
        return Session(folder, model, store, supervisor, limits_of(settings.adapt))
    except StoreInUse:
        raise StoreInUse("another process is training, most likely the agent: `skerry adapt status` shows it") from None


@contextmanager
def _paused_when(machine: Machine | None, supervisor: Supervisor, tell: Callable[[str], None]) -> Iterator[None]:
    """Stops the worker while this is no moment to train. The main thread is the one that the worker dies with."""
    ended = threading.Event()

    def watch() -> None:
        said = None
        while machine is not None and not ended.wait(_LOOK_S):
            why = machine.why_not()
            (supervisor.pause if why else supervisor.resume)()
            if why != said:
                tell(f"paused: {why}" if why else "goes on")
            said = why

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        supervisor.close()


class _Said:
    """Progress on stderr, a line for each stage and every few seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stage = ""
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self._stage or self._clock() >= self._next:
            self._stage, self._next = progress.stage, self._clock() + 2.0
            self.line(shown(progress))

    def line(self, text: str) -> None:
        click.echo(click.style(text, dim=True), err=True)


def shown(progress: Progress) -> str:
    text = _STAGES[progress.stage]
    if progress.total:
        text += f" {progress.done} of {progress.total}"
    if progress.loss is not None:
        text += f", loss {progress.loss:.3f}"
    if progress.left_s is not None:
        minutes, seconds = divmod(round(progress.left_s), 60)
        text += f", {minutes}:{seconds:02} left"
    return text


def told(outcome: Outcome) -> str:
    verdict = outcome.result.verdict
    assert verdict is not None
    done = f"in use in slot {outcome.slot}" if verdict.passed else "dropped"
    return f"adapter {outcome.adapter.id[:12]} (v{outcome.adapter.version}): {done}: {verdict.reason}{scored(verdict)}"


def scored(verdict: Verdict) -> str:
    """What it was judged by, for people; empty if it never came to that."""
    parts = [
        f"{name} {_scores(scores)}"
        for name, scores in (("bare", verdict.bare), ("before", verdict.present), ("this", verdict.candidate))
        if scores is not None
    ]
    return f" [{verdict.judged} held-out lessons: {'; '.join(parts)}]" if parts else ""


def _scores(scores: Scores) -> str:
    learned = "" if scores.loss is None else f"loss {scores.loss:.3f}, right {scores.top1:.0%}, "
    return f"{learned}perplexity {scores.perplexity:.1f}"


def facts(outcome: Outcome) -> dict[str, Any]:
    kept: dict[str, Any] = msgspec.to_builtins(outcome.adapter)
    trained = msgspec.to_builtins(outcome.result.trained)
    return {"slot": outcome.slot, "in_use": not outcome.adapter.dropped, "adapter": kept, "trained": trained}
