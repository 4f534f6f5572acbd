"""`skerry bench`: speed, as ratios measured side by side in one run."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import platformdirs

from models.store import Places
from tools.fetch import model_file


def _model(name: str) -> Path:
    return model_file(name, Places.of(os.environ))


def _progress(as_json: bool) -> Callable[[str], None]:
    """Progress goes to stderr, so that `--json` prints one object and nothing else."""
    return lambda line: click.echo(click.style(line, dim=True), err=True) if not as_json or os.isatty(2) else None


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        click.echo(f"{key:<{width}}  {value}")


@click.group(epilog="Example: skerry bench decode --json")
def bench() -> None:
    """Measure speed, side by side, on this machine. Nothing else should run meanwhile."""


@bench.command(epilog="Example: skerry bench decode --busy 1 --json")
@click.option("--model", default="smollm2-135m", show_default=True, help="catalog id or path of a GGUF file")
@click.option("--tokens", type=click.IntRange(16), default=64, show_default=True, help="per arm and round")
@click.option("--rounds", type=click.IntRange(1), default=12, show_default=True)
@click.option("--busy", type=click.IntRange(0), default=0, help="also measure beside this many busy processes")
@click.option("--json", "as_json", is_flag=True)
def decode(model: str, tokens: int, rounds: int, busy: int, as_json: bool) -> None:
    """The token loop against a bare llama_decode loop and against llama-cpp-python."""
    from tools.bench import decode as arms

    result = arms.measure(_model(model), tokens=tokens, rounds=rounds, busy=busy, progress=_progress(as_json))
    _print(result, as_json)


@bench.command(epilog="Example: skerry bench link --rtt-ms 80 --escalate 0.2 --json")
@click.option("--model", default="smollm2-135m", show_default=True, help="the device's model")
@click.option("--cloud-model", default="qwen2.5-coder-0.5b", show_default=True, help="the cloud's model")
@click.option("--rtt-ms", type=click.FloatRange(0), default=80.0, show_default=True, help="round-trip time of the link")
@click.option("--escalate", type=click.FloatRange(0.01, 1), default=0.2, show_default=True, help="share of tokens")
@click.option("--tokens", type=click.IntRange(16), default=64, show_default=True, help="per answer")
@click.option("--burst", type=click.IntRange(1), default=4, show_default=True, help="of the arm with bursts")
@click.option("--json", "as_json", is_flag=True)
def link(model: str, cloud_model: str, rtt_ms: float, escalate: float, tokens: int, burst: int, as_json: bool) -> None:
    """Draft-ahead against a loop that waits for each reply, over a link with a delay."""
    from tools.bench import link as arms

    result = asyncio.run(
        arms.measure(
            _model(model),
            cloud_model,
            rtt_ms=rtt_ms,
            escalate=escalate,
            tokens=tokens,
            burst=burst,
            progress=_progress(as_json),
        )
    )
    _print(result, as_json)


@bench.command(epilog="Example: skerry bench start --json")
@click.option("--model", default="smollm2-135m", show_default=True, help="catalog id or path of a GGUF file")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def start(model: str, rounds: int, as_json: bool) -> None:
    """Process start to first token, and an agent's memory."""
    from tools.bench import start as arms

    _print(arms.measure(_model(model), rounds=rounds, progress=_progress(as_json)), as_json)


@bench.command(epilog="Example: skerry bench cache --entries 100000 --json")
@click.option("--entries", type=click.IntRange(100), default=100_000, show_default=True, help="in the memory")
@click.option("--width", type=click.IntRange(16, 8192), default=576, show_default=True, help="bytes of a key")
@click.option("--queries", type=click.IntRange(10), default=2000, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def cache(entries: int, width: int, queries: int, as_json: bool) -> None:
    """The memory: lookups, recall against exact search, size on disk and in RAM, inserts."""
    from tools.bench import cache as arms

    _print(arms.measure(entries, width=width, queries=queries, progress=_progress(as_json)), as_json)


@bench.command(epilog="Example: skerry bench peer --json")
@click.option("--questions", type=click.IntRange(10), default=1000, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def peer(questions: int, as_json: bool) -> None:
    """A question to a peer and its answer, through Mosquitto and through `skerry broker`."""
    from tools.bench import peer as arms

    _print(arms.measure(questions=questions, progress=_progress(as_json)), as_json)


@bench.command(epilog="Example: skerry bench adapt --json")
@click.option("--model", default="smollm2-135m", show_default=True, help="catalog id or path of a GGUF file")
@click.option(
    "--lessons", type=click.IntRange(50), default=100, show_default=True, help="that are trained on and judged"
)
@click.option("--adapters", type=click.IntRange(2), default=100, show_default=True, help="that the edge aggregates")
@click.option("--rounds", type=click.IntRange(3), default=20, show_default=True, help="of decoding with and without")
@click.option("--json", "as_json", is_flag=True)
def adapt(model: str, lessons: int, adapters: int, rounds: int, as_json: bool) -> None:
    """Training with its memory and pause, adapters attached and decoding, and the edge's aggregate. Needs torch."""
    from tools.bench import adapt as arms

    result = arms.measure(_model(model), lessons=lessons, adapters=adapters, rounds=rounds, progress=_progress(as_json))
    _print(result, as_json)


@bench.command(epilog="Example: skerry bench engines --json")
@click.option("--model", default="smollm2-135m", show_default=True, help="catalog id or path of a GGUF file")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: platformdirs.user_cache_path("skerry") / "eval",
    show_default="your cache folder",
    help="where the text and the files that are made are kept",
)
@click.option("--tokens", type=click.IntRange(16), default=128, show_default=True, help="read of each of 8 passages")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="0: one per physical core")
@click.option("--json", "as_json", is_flag=True)
def engines(model: str, cache: Path, tokens: int, rounds: int, threads: int, as_json: bool) -> None:
    """One model for llama.cpp and for onnxruntime, in several widths; needs the extra `export` the first time."""
    from tools.bench import engines as arms

    result = arms.measure_all(
        _model(model),
        cache=cache,
        env=os.environ,
        tokens=tokens,
        rounds=rounds,
        threads=threads,
        progress=_progress(as_json),
    )
    if as_json:
        click.echo(json.dumps(result))
        return
    rows = result.pop("engines")
    names = list(next(iter(rows.values())))
    click.echo(f"{'':<20}" + "".join(f"{name:>16}" for name in names))
    for engine, row in rows.items():
        click.echo(f"{engine:<20}" + "".join(f"{row[name]:>16}" for name in names))
    _print(result, as_json)


@bench.command("all", epilog="Example: skerry bench all")
@click.pass_context
def everything(context: click.Context) -> None:
    """decode (also beside a busy process), link, start, cache and peer, one after the other."""
    for command, options in ((decode, {"busy": 1}), (link, {}), (start, {}), (cache, {}), (peer, {})):
        click.echo(click.style(f"== {command.name}", bold=True))
        context.invoke(command, **options)
