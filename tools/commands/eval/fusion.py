"""`skerry eval fusion`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import platformdirs

from models.store import Places
from tools.fetch import model_file

_COLUMNS = ("right", "agreement", "nll", "asked")


@click.command(epilog="Example: skerry eval fusion --documents 4")
@click.option("--slm", default="qwen2.5-coder-0.5b", show_default=True, help="the device's model")
@click.option("--llm", default="qwen2.5-coder-1.5b", show_default=True, help="the cloud's model")
@click.option("--documents", type=click.IntRange(1), default=16, show_default=True, help="notes, of 3 questions each")
@click.option("--tau", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="ask the cloud when u > tau")
@click.option("--seed", type=int, default=0, show_default=True, help="draws the notes")
@click.option("--threads", type=click.IntRange(0), default=0, help="for the models; 0: all cores")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: platformdirs.user_cache_path("skerry") / "eval",
    show_default="the user's cache folder",
    help="where recorded model passes are kept",
)
@click.option("--json", "as_json", is_flag=True)
def fusion(slm: str, llm: str, documents: int, tau: float, seed: int, threads: int, cache: Path, as_json: bool) -> None:
    """What the weight of mode fuse is worth: a private note on the device, only the question in the cloud.

    The first run writes every answer with both models, which takes some 10 minutes on two cores; a second one reads
    the recordings.
    """
    from tools.eval.fusion import evaluate

    places = Places.of(os.environ)
    result = evaluate(
        model_file(slm, places),
        model_file(llm, places),
        cache,
        notes=documents,
        tau=tau,
        seed=seed,
        threads=threads,
        say=lambda line: click.echo(click.style(line, dim=True), err=True),
    )
    click.echo(json.dumps(result) if as_json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in result["arms"]):
        rows = [row for row in result["arms"] if row["kind"] == kind]
        lines.append(click.style(f"{kind}, {rows[0]['questions']} questions", bold=True))
        lines.append(f"{'':18}" + "".join(f"{name:>11}" for name in _COLUMNS))
        lines += [f"{row['arm']:18}" + "".join(f"{row[name]:>11.3f}" for name in _COLUMNS) for row in rows]
        lines.append("")
    return "\n".join(lines).rstrip()
