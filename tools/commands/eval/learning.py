"""`skerry eval news` and `skerry eval text`: arms that decide when to ask, side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import platformdirs

from models.store import Places
from tools.fetch import model_file

if TYPE_CHECKING:
    from tools.eval.learning import Trial

Command = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that both commands take."""

    slms: tuple[str, ...]
    llm: str
    documents: int
    devices: int
    alpha: float
    seeds: int
    seed: int
    threads: int
    cache: Path
    plot: Path | None
    as_json: bool

    def models(self) -> tuple[list[Path], Path]:
        """Files of the devices' models and of the cloud's."""
        places = Places.of(os.environ)
        return [model_file(name, places) for name in self.slms], model_file(self.llm, places)

    def trial(self) -> Trial:
        from tools.eval.learning import Trial

        return Trial(self.devices, self.alpha, self.seeds, self.seed)


def _options(documents: int) -> Callable[[Command], Command]:
    """What both commands take. `documents`: how many by default."""
    added = [
        click.option(
            "--slm",
            "slms",
            multiple=True,
            default=("qwen2.5-coder-0.5b", "smollm2-135m"),
            show_default=True,
            help="the devices' model; with several, each by itself and a fleet in which they are mixed",
        ),
        click.option("--llm", default="qwen2.5-coder-1.5b", show_default=True, help="the cloud's model"),
        click.option(
            "--documents", type=click.IntRange(1), default=documents, show_default=True, help="how many texts"
        ),
        click.option("--devices", type=click.IntRange(2, 200), default=10, show_default=True),
        click.option(
            "--alpha",
            type=click.FloatRange(0.01, 1000),
            default=0.3,
            show_default=True,
            help="of the Dirichlet distribution of labels over devices: the smaller, the more they differ",
        ),
        click.option(
            "--seeds",
            type=click.IntRange(1, 50),
            default=5,
            show_default=True,
            help="how many fleets and splits are drawn",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="the first of them; also draws the texts"),
        click.option("--threads", type=click.IntRange(0), default=0, help="for the models; 0: all cores"),
        click.option(
            "--cache",
            type=click.Path(file_okay=False, path_type=Path),
            default=lambda: platformdirs.user_cache_path("skerry") / "eval",
            show_default="the user's cache folder",
            help="where recorded model passes are kept",
        ),
        click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="draw into this PNG file"),
        click.option("--json", "as_json", is_flag=True),
    ]

    def add(command: Command) -> Command:
        def collected(**given: Any) -> None:
            own = {name: given.pop(name) for name in list(given) if name not in Asked.__dataclass_fields__}
            command(Asked(**given), **own)

        collected.__doc__, collected.__name__ = command.__doc__, command.__name__
        for option in reversed(added):
            collected = option(collected)
        return collected

    return add


@click.command(epilog="Example: skerry eval news --data reviews.csv --devices 6 --plot news.png")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="a CSV file with columns label and text, in place of the BBC's articles",
)
@_options(documents=400)
def news(asked: Asked, data: Path | None) -> None:
    """When to ask, on texts with labels: thresholds learned alone and together, routers, and the best in hindsight.

    Quality is the share of labels that are right. The first run passes all texts through all models, which takes some
    20 minutes on two cores; a second one reads the recordings.
    """
    from tools.eval.learning import of_news
    from tools.eval.news import bbc
    from tools.eval.table import read

    texts = read(data).drawn(asked.documents, asked.seed) if data else bbc(asked.cache, asked.documents, asked.seed)
    _show(of_news(*asked.models(), texts, asked.cache, asked.trial(), asked.threads, _say), asked)


@click.command(epilog="Example: skerry eval text --json")
@_options(documents=24)
def text(asked: Asked) -> None:
    """The same, token by token, on open text: continuations, summaries and answers about news articles.

    Quality is the share of tokens that are the LLM's. The first run takes some 20 minutes on two cores.
    """
    from tools.eval.data import articles
    from tools.eval.learning import of_text

    found = articles(asked.cache, asked.seed)[: asked.documents]
    _show(of_text(*asked.models(), found, asked.cache, asked.trial(), asked.threads, _say), asked)


def _say(line: str) -> None:
    click.echo(click.style(line, dim=True), err=True)


def _show(result: dict[str, Any], asked: Asked) -> None:
    from tools.eval.report import draw, tables

    if asked.plot is not None:
        draw(result, asked.plot)
    click.echo(json.dumps(result) if asked.as_json else tables(result))
