"""`skerry eval news` and `skerry eval text`: what learning when to ask is worth, pair by pair (docs/results.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.eval import news, text
from tools.eval.compare import compare
from tools.eval.data import Article
from tools.eval.decisions import Decisions
from tools.eval.fleets import pool, room
from tools.eval.recordings import Model, Progress
from tools.eval.table import Dataset
from tools.eval.views import Views, views

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """How fleets are drawn. `seed`: the first of `seeds`; it also draws the articles."""

    devices: int
    alpha: float
    seeds: int
    seed: int


Read = Callable[[Model, Model], tuple[Decisions, Views | None]]


def of_news(
    slms: Sequence[Path], llm: Path, data: Dataset, cache: Path, trial: Trial, threads: int, say: Progress
) -> Json:
    """Raises ConfigError, BadModelFile, ContextFull."""

    def read(small: Model, large: Model) -> tuple[Decisions, Views]:
        found = news.decisions(small, large, data, cache, trial.seed, say)
        of_slm, of_llm = (news.readings(model, data, cache, say) for model in (small, large))
        return found, views(of_slm, of_llm)

    return _pairs(slms, llm, threads, trial, say, read)


def of_text(
    slms: Sequence[Path], llm: Path, found: Sequence[Article], cache: Path, trial: Trial, threads: int, say: Progress
) -> Json:
    """Raises ConfigError, BadModelFile."""

    def read(small: Model, large: Model) -> tuple[Decisions, None]:
        return text.decisions(small, large, found, cache, trial.seed, say), None

    return _pairs(slms, llm, threads, trial, say, read)


def _pairs(slms: Sequence[Path], llm: Path, threads: int, trial: Trial, say: Progress, read: Read) -> Json:
    """The JSON of the commands: the first pair's, and all under `pairs`. With several small models, the last of them
    is a fleet in which they are mixed."""
    large = Model(llm, threads=threads, hidden=False)
    recorded = []
    for path in slms:
        small = Model(path, threads=threads, hidden=True)
        recorded.append(read(small, large))
        small.close()
    large.close()
    pools = [pool([found], seen) for found, seen in recorded]
    if len(recorded) > 1:
        pools.append(pool([found for found, _ in recorded]))
    pairs = []
    for steps in pools:
        devices = min(trial.devices, room(steps))
        if devices < trial.devices:
            say(f"{trial.devices} devices would have too few texts each: there are {devices}")
        say(f"{steps.data.slm}: {len(steps.kind)} steps, {trial.seeds} fleets")
        pairs.append(compare(steps, devices=devices, alpha=trial.alpha, seeds=trial.seeds, first_seed=trial.seed))
    return {**pairs[0], "pairs": pairs}
