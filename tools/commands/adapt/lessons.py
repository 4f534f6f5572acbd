"""`skerry adapt add` and `forget`: what there is to learn from."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from agent.adapt.examples import read
from agent.adapt.lesson import Source
from agent.adapt.lessons import lessons_of
from agent.adapt.session import adapters_folder, check_takes_adapters, erase
from agent.config import AgentConfig
from agent.privacy import Detector
from models.engine.open import open_tokenizer
from models.fingerprint import fingerprint
from models.store import Places
from tools.fetch import model_file
from tools.settings import configuration

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
of_config = click.option("--config", type=click.Path(path_type=Path), help="The agent's configuration file.")

_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}


@click.command(epilog="Example: skerry adapt add examples.jsonl")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@of_config
@as_json
def add(file: Path, config: Path | None, as_json: bool) -> None:
    """Add labelled examples from FILE: one JSON object a line, with `prompt` (text) or `messages` (as of the chat
    API), `answer`, and if wanted `private` (true: for this device's own adapter only, false: whatever is in it) and
    `weight`. All of them or, if a line is wrong, none. The agent may be running."""
    settings = configuration(AgentConfig, "agent", config, os.environ)
    model = model_file(settings.model.name, Places.of(os.environ))
    check_takes_adapters(model)
    tokenizer = open_tokenizer(model)
    with closing(lessons_of(settings, fingerprint(model))) as lessons, file.open("rb") as lines:
        with click.progressbar(length=file.stat().st_size, label=file.name, file=sys.stderr) as bar:
            added = lessons.add_all(read(lines, tokenizer, settings.model.context, bar.update, _personal(settings)))
        facts = {"added": added, "lessons": lessons.count, "revision": lessons.revision}
    told = f"{added:,} examples added; there are {facts['lessons']:,} lessons for this model"
    click.echo(json.dumps(facts) if as_json else told)


def _personal(settings: AgentConfig) -> Callable[[str], bool]:
    if settings.privacy.detect == "off":
        return lambda text: False
    detector = Detector(settings.privacy.regions)
    return lambda text: bool(detector.spans(text))


def _duration(context: click.Context, parameter: click.Parameter, given: str | None) -> float | None:
    if given is None:
        return None
    found = re.fullmatch(r"(\d{1,9})([mhdw])", given)
    if not found:
        raise click.BadParameter("write a number and m, h, d or w, such as 30d")
    return int(found[1]) * _SECONDS[found[2]]


@click.command(epilog="Example: skerry adapt forget --before 30d")
@click.option("--source", type=click.Choice(["cloud", "correction", "example"]), help="Only what came from there.")
@click.option("--private", is_flag=True, help="Only what came from private requests.")
@click.option("--before", metavar="DURATION", callback=_duration, help="Only what is older, in running time: 12h, 30d.")
@click.option("--all", "everything", is_flag=True, help="All lessons.")
@of_config
@as_json
def forget(
    source: Source | None,
    private: bool,
    before: float | None,
    everything: bool,
    config: Path | None,
    as_json: bool,
) -> None:
    """Forget lessons for good, for whatever model: nothing of them stays on the disk. The agent may be running; an
    answer that it finishes just now may still become a lesson, and a training that is under way begins anew with what
    is left. Adapters that were trained stay as they are.

    \b
    Examples:
      skerry adapt forget --source cloud --before 30d
      skerry adapt forget --all
    """
    some = source is not None or private or before is not None
    if some == everything:
        raise click.UsageError("give --all, or at least one of --source, --private and --before")
    settings = configuration(AgentConfig, "agent", config, os.environ)
    with closing(lessons_of(settings, "")) as lessons:
        gone = lessons.forget(source, private, before)
    erase(adapters_folder(settings))
    facts: dict[str, Any] = {"forgotten": gone}
    click.echo(json.dumps(facts) if as_json else f"{gone:,} lessons forgotten")
