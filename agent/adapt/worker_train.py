"""The half of the worker that needs torch: from the job's lessons to the candidate's file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from agent.adapt import job
from agent.adapt.checkpoint import Checkpoint
from agent.adapt.hardware import Shapes, choose_rank, load_table, predicted_mb, save_table
from agent.adapt.job import Job, Progress, Trained
from agent.adapt.lesson import Lesson
from agent.adapt.measure import step as measured
from agent.adapt.recipe import Progress as Step
from agent.adapt.recipe import Recipe
from agent.adapt.retain import plain
from agent.adapt.router import centroid
from agent.adapt.train import Base, states_all, train
from models import adapter as adapters
from models.engine.gguf import GgufTokenizer
from models.rss import rss

_LATENCY = "latency.json"
_USUAL = 8  # a rank that is measured besides the largest that fits the memory

Tell = Callable[[Progress], None]


def trained(folder: Path, given: Job, lessons: Sequence[Lesson], tell: Tell) -> Trained:
    """What it took. Raises TrainingError, BadAdapter, BadModelFile, StoreError."""
    assert given.recipe is not None
    base = Base.load(Path(given.model), given.threads, given.recipe.bfloat16)
    tokenizer = GgufTokenizer.open(Path(given.model))
    whole = [*lessons, *plain(tokenizer)]
    recipe, predicted = _sized(folder, given, base, whole)
    start = adapters.read(Path(given.start)) if given.start else None
    last = Step("reading", 0, 0, 0.0, 0.0, 0.0, 0.0)

    def step(told: Step) -> None:
        nonlocal last
        last = told
        tell(Progress("train", told.step, told.steps, told.loss, told.eta_s if told.step else None))

    began = time.monotonic()
    made = train(base, whole, recipe, start, Checkpoint(folder / job.CHECKPOINT), step)
    seconds = time.monotonic() - began
    tell(Progress("write"))
    centre = centroid(lambda tokens: states_all(base, None, tokens), tokenizer, lessons)
    id = adapters.write(replace(made, centroid=centre), folder / job.CANDIDATE)
    return Trained(
        id=id,
        rank=recipe.rank,
        lessons=len(lessons) - last.left_out,
        steps=last.steps,
        seconds=seconds,
        examples_per_s=last.examples_per_s,
        rss=rss(peak=True),
        predicted=predicted,
    )


def _sized(folder: Path, given: Job, base: Base, lessons: Sequence[Lesson]) -> tuple[Recipe, int]:
    """The recipe with its rank, and the memory that it is said to take, bytes. A rank that was chosen before stays, so
    that the checkpoint holds. Raises TrainingError if none fits."""
    assert given.recipe is not None
    fitting = [one for one in lessons if len(one.tokens) <= given.recipe.tokens] or lessons
    length, rows = max(len(one.tokens) for one in fitting), max(len(one.targets) for one in fitting)
    shapes, bfloat16 = Shapes.of(Path(given.model)), base.dtype == torch.bfloat16
    recipe = job.read(folder, job.RECIPE, Recipe)
    if recipe is None:
        rank = given.rank or _chosen(folder.parent / _LATENCY, given, base, shapes, length, rows)
        recipe = msgspec.structs.replace(given.recipe, rank=rank)  # alpha stays, as in Hu et al. (2022), section 4.1
        job.write(folder, job.RECIPE, recipe)
    tokens = max(length, min(recipe.tokens, recipe.batch * length))
    return recipe, int(predicted_mb(shapes, recipe, tokens, recipe.batch * rows, bfloat16) * (1 << 20))


def _chosen(path: Path, given: Job, base: Base, shapes: Shapes, length: int, rows: int) -> int:
    """The largest rank that fits. What a step takes is measured once on this machine, and kept in `path`."""
    assert given.recipe is not None
    recipe, memory = given.recipe, given.memory / (1 << 20)
    table = load_table(path, base.fingerprint, given.threads, base.dtype == torch.bfloat16)
    if not table.points:
        for rank in {_USUAL, choose_rank(memory, given.step_s, table, shapes, recipe, length=length, rows=rows)}:
            table = table.with_point(measured(base, msgspec.structs.replace(recipe, rank=rank), length))
        save_table(path, table)
    return choose_rank(memory, given.step_s, table, shapes, recipe, length=length, rows=rows)
