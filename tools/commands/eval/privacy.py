"""`skerry eval privacy`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import platformdirs


@click.command(epilog="Example: skerry eval privacy --seed 1 --json")
@click.option("--count", type=click.IntRange(1, 100_000), default=200, show_default=True, help="texts per kind")
@click.option("--seed", type=int, default=0, show_default=True, help="draws the texts")
@click.option("--region", "regions", multiple=True, default=("GB", "US"), show_default=True, help="as privacy.regions")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: platformdirs.user_cache_path("skerry") / "eval",
    show_default="the user's cache folder",
    help="where news articles lie, if they were fetched before",
)
@click.option("--json", "as_json", is_flag=True)
def privacy(count: int, seed: int, regions: tuple[str, ...], cache: Path, as_json: bool) -> None:
    """How much personal data is found, and how often something else is taken for it, on generated data."""
    from tools.eval.privacy import evaluate

    result = evaluate(seed, count, regions, cache)
    click.echo(json.dumps(result) if as_json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [click.style(f"on generated data, seed {result['seed']}; real text may differ", bold=True)]
    lines.append(f"{'':24}{'texts':>8}{'found':>9}{'partly':>9}")
    lines += [
        f"{row['group']:24}{row['texts']:>8}{row['found']:>9.1%}{row['partly']:>9.1%}" for row in result["recall"]
    ]
    lines += ["", "taken for personal, per 1,000 words"]
    lines.append(_spans("texts that only look like it (false positives)", result["lookalikes"]))
    if "articles" in result:
        lines.append(_spans("news articles (unlabelled; names of public persons count)", result["articles"]))
    lines += ["", f"{result['ms_per_kb']:.1f} ms of processor time per kB of generated data"]
    if "articles" in result:
        lines.append(f"{result['articles_ms_per_kb']:.1f} ms per kB of articles")
    return "\n".join(lines)


def _spans(title: str, found: dict[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {rate:.1f}" for kind, rate in found["kinds"].items())
    return f"  {title}: {found['per_1000_words']:.1f}" + (f" ({kinds})" if kinds else "")
