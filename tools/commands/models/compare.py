"""`skerry models compare`: two models side by side, by what they say and what they cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import click
import platformdirs

from models.store import Places, resolve_model
from models.workshop.compare import Comparison, compare
from models.workshop.job import Job
from models.workshop.measure import Measured
from models.workshop.perplexity import Estimate
from models.workshop.speed import ROUNDS
from protocol.errors import ConfigError
from tools.commands.models.stored import as_json
from tools.eval.data import articles


@click.command(name="compare")
@click.argument("first", metavar="ID|PATH")
@click.argument("second", metavar="ID|PATH")
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="Of each passage, at most.")
@click.option("--passages", type=click.IntRange(1), default=8, show_default=True, help="Pieces of text to read.")
@click.option("--threads", type=click.IntRange(0), default=0, help="For the models; 0: all cores.")
@click.option(
    "--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="Of the speed; their median counts."
)
@click.option("--text", type=click.Path(path_type=Path), help="Your own text (UTF-8). [default: BBC news]")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: platformdirs.user_cache_path("skerry") / "eval",
    show_default="the user's cache folder",
    help="Where the news are kept, and what the models say meanwhile.",
)
@as_json
def compare_models(
    first: str,
    second: str,
    tokens: int,
    passages: int,
    threads: int,
    rounds: int,
    text: Path | None,
    cache: Path,
    as_json: bool,
) -> None:
    """Compare two models, or two files of one model: how well they foretell a text, how alike they are, size, speed
    and memory.

    The first one is what the second is held against. Nothing else should run meanwhile. Brackets hold 95 % intervals.

    \b
    Example:
      skerry models compare smollm2-135m ~/smollm2-int4
    """
    places = Places.of(os.environ)
    paths = resolve_model(first, places), resolve_model(second, places)
    if text is not None:
        texts = _pieces(text, passages)
    else:
        texts = [article.text for article in articles(cache, seed=0)[:passages]]
    job = Job(os.environ, lambda line: click.echo(line, err=True))
    found = compare(*paths, texts, cache, tokens=tokens, threads=threads, rounds=rounds, job=job)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        click.echo("\n".join(_table(found, (first, second))))


def _pieces(path: Path, count: int) -> list[str]:
    """`count` parts of the text, equally long, each from a word's beginning. Raises ConfigError."""
    try:
        text = path.expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"--text {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--text {path}: not a text in UTF-8") from None
    edges = [len(text) * n // count for n in range(count + 1)]
    parts = [text[begin:end] for begin, end in pairwise(edges)]
    return [parts[0], *(part.partition(" ")[2] or part for part in parts[1:])]


def _table(found: Comparison, names: tuple[str, str]) -> Iterator[str]:
    for number, name in enumerate(names, 1):
        yield f"{number}: {name}"
    rows = [("", "1", "2", "2 / 1"), *_rows(found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for title, *cells in rows:
        right = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join((f"{title:{widths[0]}}", *right)).rstrip()
    counts = sorted({found.first.tokens, found.second.tokens})
    yield f"\n{' and '.join(map(str, counts))} tokens were foretold" + (
        "."
        if found.close
        else "; of different tokenizers, so only bits per byte compare, and neither agreement nor KL."
    )


def _rows(found: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """Title, first, second, and second over first."""
    one, two, close = found.first, found.second, found.close
    yield "size", f"{one.bytes / 1e6:,.1f} MB", f"{two.bytes / 1e6:,.1f} MB", _ratio(two.bytes, one.bytes)
    yield "quantisation", one.quantisation, two.quantisation, ""
    yield "engine", one.engine, two.engine, ""
    ratio = _interval(close.perplexity_ratio, ".3f") if close else "not defined"
    yield "perplexity", _perplexity(one), _perplexity(two), ratio
    bits = one.bits_per_byte, two.bits_per_byte
    yield "bits per byte", f"{bits[0]:.3f}", f"{bits[1]:.3f}", _ratio(bits[1], bits[0])
    yield "top-1 agreement", "", _interval(close.agreement, ".3f") if close else "not defined", ""
    yield "KL(1 || 2), nats", "", _interval(close.kl, ".4f") if close else "not defined", ""
    for title, name, unit, digits in (
        ("decode", "decode_tok_s", "tok/s", ".1f"),
        ("prefill", "prefill_tok_s", "tok/s", ".1f"),
        ("first token", "first_token_ms", "ms", ".0f"),
        ("peak RSS", "rss_mb", "MB", ",.0f"),
    ):
        values = getattr(one, name), getattr(two, name)
        yield title, f"{values[0]:{digits}} {unit}", f"{values[1]:{digits}} {unit}", _ratio(values[1], values[0])


def _perplexity(measured: Measured) -> str:
    return _interval(Estimate(measured.perplexity, *measured.perplexity_95), ".2f")


def _interval(estimate: Estimate, digits: str) -> str:
    return f"{estimate.value:{digits}} [{estimate.low:{digits}}, {estimate.high:{digits}}]"


def _ratio(second: float, first: float) -> str:
    return f"{second / first:.3f}" if first else ""
