"""`skerry eval flywheel`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import platformdirs

from models.store import Places
from tools.fetch import model_file


@click.command(epilog="Example: skerry eval flywheel --data reviews.csv --plot flywheel.png")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="a CSV file with columns label and text, in place of the BBC's articles",
)
@click.option("--slm", default="smollm2-135m", show_default=True, help="the devices' model")
@click.option("--llm", default="qwen2.5-coder-1.5b", show_default=True, help="the cloud's model")
@click.option("--documents", type=click.IntRange(40), default=600, show_default=True, help="how many texts")
@click.option("--devices", type=click.IntRange(2, 50), default=4, show_default=True)
@click.option(
    "--alpha",
    type=click.FloatRange(0.01, 1000),
    default=0.5,
    show_default=True,
    help="of the Dirichlet distribution of labels over devices: the smaller, the more they differ",
)
@click.option(
    "--price",
    type=click.FloatRange(0.01, 0.99),
    default=0.5,
    show_default=True,
    help="of an LLM answer: devices ask where it would reject their own at least so probably",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="that devices begin with; 0: they ask until they have learned when not to",
)
@click.option(
    "--corrections",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="share of the answers to which users say what is right, in the arms with corrections",
)
@click.option("--rank", type=click.IntRange(1, 64), default=8, show_default=True, help="of the adapters")
@click.option("--seed", type=int, default=0, show_default=True, help="draws texts, devices and corrections")
@click.option("--threads", type=click.IntRange(0), default=0, help="for the models; 0: all cores")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: platformdirs.user_cache_path("skerry") / "eval",
    show_default="the user's cache folder",
    help="where model passes and adapters are kept",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="draw into this PNG file")
@click.option("--json", "as_json", is_flag=True)
def flywheel(
    data: Path | None,
    slm: str,
    llm: str,
    documents: int,
    devices: int,
    alpha: float,
    price: float,
    threshold: float,
    corrections: float,
    rank: int,
    seed: int,
    threads: int,
    cache: Path,
    plot: Path | None,
    as_json: bool,
) -> None:
    """What devices learn from the help they get: a stream of texts to be labelled, over devices with different topics.

    Arms: thresholds only, plus memory, plus each device's own adapter, plus the fleet's; taught by the LLM's answers
    alone, or by users who correct some. The first run takes up to 40 minutes on two cores; one that was interrupted
    goes on where it was. Needs the extra `train`.
    """
    from tools.eval.flywheel.run import Setting, flywheel
    from tools.eval.flywheel.show import draw, table
    from tools.eval.news import bbc
    from tools.eval.table import read

    places = Places.of(os.environ)
    texts = read(data).drawn(documents, seed) if data else bbc(cache, documents, seed)
    setting = Setting(devices, alpha, price, threshold, corrections, rank, seed)
    result = flywheel(model_file(slm, places), model_file(llm, places), texts, cache, setting, threads, _say)
    if plot is not None:
        draw(result, plot)
    click.echo(json.dumps(result) if as_json else table(result))


def _say(line: str) -> None:
    click.echo(click.style(line, dim=True), err=True)
