"""What training takes on this machine: seconds of a step, and peak memory against the prediction.

    python -m agent.adapt.measure MODEL.gguf [THREADS]

prints the table of predicted and measured memory; each measurement is a process of its own.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from agent.adapt.below import Below
from agent.adapt.factors import Trained, beginning
from agent.adapt.hardware import Point, Shapes, predicted_mb
from agent.adapt.lesson import Lesson, Target
from agent.adapt.prepare import prepare
from agent.adapt.recipe import Recipe
from agent.adapt.torch_model import Base
from agent.adapt.train import gradients
from models.rss import rss

RANKS, LENGTHS = (4, 8, 32), (128, 384)


def step(base: Base, recipe: Recipe, length: int, repeats: int = 2) -> Point:
    """The median step over lessons of `length` tokens, after one that warms up."""
    random = np.random.default_rng(0)
    tokens = [random.integers(0, base.vocab, length + 1).tolist() for _ in range(recipe.batch)]
    lessons = [Lesson(row, [Target(length, "label", row[-1:])], "example") for row in tokens]
    examples = prepare(base, lessons, recipe)
    trained = Trained(beginning(base, recipe, None), recipe)
    below, took = Below(base, trained.lows), []
    with base.changed(trained.lows):
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            gradients(base, examples, recipe, below)
            trained.update(1e-4, 1.0)
            trained.forget_gradients()
            took.append(time.perf_counter() - begun)
    return Point(recipe.rank, recipe.batch, length, float(np.median(took[1:])))


def main(model: str, threads: str = "1", *case: str) -> None:
    if case:
        rank, length, bfloat16 = (int(value) for value in case)
        point = step(Base.load(Path(model), int(threads), bool(bfloat16)), Recipe(rank=rank), length)
        print(rss(peak=True) / (1 << 20), point.seconds)
        return
    shapes = Shapes.of(Path(model))
    print("type      rank  length  predicted MB  measured MB  error  s/step")
    for bfloat16, length, rank in itertools.product((1, 0), LENGTHS, RANKS):
        command = [sys.executable, "-m", "agent.adapt.measure", model, threads, str(rank), str(length), str(bfloat16)]
        peak, seconds = map(float, subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split())
        recipe = Recipe(rank=rank)
        said = predicted_mb(shapes, recipe, recipe.batch * length, recipe.batch, bool(bfloat16))
        kind = "bfloat16" if bfloat16 else "float32"
        print(
            f"{kind:8}  {rank:4}  {length:6}  {said:12.0f}  {peak:11.0f}  {said / peak - 1:+5.0%}  {seconds:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
