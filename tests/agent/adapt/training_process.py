"""Trains until it is killed, or writes the factors that came out; for test_train_checkpoint.py.

Arguments: model, folder, the step at which to stop and wait to be killed (0: none), and megabytes of address space
beyond what loading the model took (0: no bound).
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import numpy as np

from agent.adapt.checkpoint import Checkpoint
from agent.adapt.lesson import Lesson, Target
from agent.adapt.recipe import Progress, Recipe
from agent.adapt.torch_model import Base
from agent.adapt.train import train
from protocol.errors import TrainingError

RECIPE = Recipe(rank=2, epochs=3, batch=2, seed=3)


def lessons() -> list[Lesson]:
    """Nine, of several lengths."""
    texts = [[(7 * n + at) % 90 for at in range(4 + n)] for n in range(9)]
    return [Lesson([*text, 5], [Target(2, "kept"), Target(len(text), "label", [5])], "example") for text in texts]


def bound(megabytes: int) -> None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            limit = int(line.split()[1]) * 1024 + (megabytes << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(model: str, folder: str, stop: str, megabytes: str) -> None:
    def told(progress: Progress) -> None:
        print(progress.stage, progress.step, flush=True)
        if progress.step == int(stop) and progress.stage == "training":
            signal.pause()

    base = Base.load(Path(model), 1, bfloat16=False)
    recipe, taught = RECIPE, lessons()
    if int(megabytes):
        long = [at % 90 for at in range(400)]
        recipe, taught = Recipe(batch=64, tokens=64 * 400), [Lesson(long, [Target(399, "label", [5])], "example")] * 64
        bound(int(megabytes))
    try:
        adapter = train(base, taught, recipe, None, Checkpoint(Path(folder) / "checkpoint", every=2), told)
    except TrainingError as error:
        sys.exit(f"TrainingError: {error}")
    factors = {f"{name}.{half}": getattr(f, half) for name, f in adapter.factors.items() for half in "ab"}
    np.savez(Path(folder) / "factors.npz", allow_pickle=False, **factors)


if __name__ == "__main__":
    main(*sys.argv[1:])
