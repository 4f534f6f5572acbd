"""`skerry eval memory`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import platformdirs

from models.store import Places
from tools.fetch import model_file

_COLUMNS = {  # of the table of thresholds
    "threshold": "threshold",
    "hits": "hits",
    "right": "right",
    "right_where_different": "right where different",
    "draft_right_there": "draft right there",
    "cloud_calls_saved": "calls saved",
    "saved_at_equal_quality": "at equal quality",
}


@click.command(epilog="Example: skerry eval memory --documents 100 --plot memory.png")
@click.option(
    "--slm",
    "slms",
    multiple=True,
    default=("smollm2-135m", "qwen2.5-coder-0.5b"),
    show_default=True,
    help="the devices' model; may be given several times",
)
@click.option("--llm", default="qwen2.5-coder-1.5b", show_default=True, help="the cloud's model")
@click.option("--documents", type=click.IntRange(14), default=100, show_default=True, help="news articles")
@click.option("--tau", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="escalate when u > tau")
@click.option("--seed", type=int, default=0, show_default=True, help="draws articles and the order of questions")
@click.option("--threads", type=click.IntRange(0), default=0, help="for the models; 0: all cores")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: platformdirs.user_cache_path("skerry") / "eval",
    show_default="the user's cache folder",
    help="where recorded model passes are kept",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="draw the figures into this PNG file")
@click.option("--json", "as_json", is_flag=True)
def memory(
    slms: tuple[str, ...],
    llm: str,
    documents: int,
    tau: float,
    seed: int,
    threads: int,
    cache: Path,
    plot: Path | None,
    as_json: bool,
) -> None:
    """What memory saves: the same questions to several devices in a row, with and without it.

    The first run passes every text through both models, which takes some 20 minutes on two cores; a second one reads
    the recordings.
    """
    from tools.eval.memory import evaluate

    places = Places.of(os.environ)
    result = evaluate(
        [model_file(name, places) for name in slms],
        model_file(llm, places),
        cache,
        documents=documents,
        seed=seed,
        tau=tau,
        threads=threads,
        say=lambda line: click.echo(click.style(line, dim=True), err=True),
    )
    if plot is not None:
        from tools.eval.plot import draw

        draw(result, plot)
    click.echo(json.dumps(result) if as_json else _tables(result, tau))


def _tables(result: dict[str, list[dict[str, Any]]], tau: float) -> str:
    lines = []
    for slm in dict.fromkeys(row["slm"] for row in result["learned"]):
        learned = [row for row in result["learned"] if row["slm"] == slm and row["tau"] == tau]
        for kind in dict.fromkeys(row["kind"] for row in learned):
            of_kind = [row for row in result["thresholds"] if row["slm"] == slm and row["kind"] == kind]
            lines += [click.style(f"{slm}, {kind}, u > {tau:g}", bold=True), _line(_COLUMNS.values())]
            for by, gate in (("similarity", False), ("similarity", True), ("score", True)):
                lines.append(f"  by {by}, {'with' if gate else 'without'} the content gate")
                lines += [_row(row) for row in of_kind if (row["by"], row["gate"]) == (by, gate)]
            lines.append("  learned, one row per order of the questions (theta of the score at the end)")
            for row in learned:
                if row["kind"] == kind:
                    low, high = row["saved_low"], row["saved_high"]
                    span = "" if low is None else f"  90 %: {low:.1%} to {high:.1%}"
                    lines.append(_row({**row, "threshold": row["theta"]}) + span)
            lines.append("")
    lines += [click.style("topics against the articles' own labels", bold=True)]
    lines += [json.dumps(row) for row in result["gold"]]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    return _line(_cell(row[name]) for name in _COLUMNS)


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _line(cells: Any) -> str:
    return "  ".join(f"{cell:>{len(title)}}" for cell, title in zip(cells, _COLUMNS.values(), strict=True))
