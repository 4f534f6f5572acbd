"""What lies in the folder of one training: the job, the lessons, how far it is, and what came of it.

job.json          what is to be done                        the agent writes it
lessons.msgpack   what is to be learned                     the agent
checkpoint        where a killed worker goes on             the worker
progress.json     how far it is                             the worker, often
adapter.gguf      the candidate                             the worker; the agent, if it is to be judged alone
trained.json      the candidate is whole; what it took      the worker
result.json       the gate's verdict, or the error          the worker, at its end
worker.log        what libraries print                      the worker
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from agent.adapt import files
from agent.adapt.recipe import Recipe
from protocol.errors import StoreError

Stage = Literal["load", "train", "write", "judge"]
S = TypeVar("S", bound=msgspec.Struct)

JOB, LESSONS, RECIPE, CHECKPOINT = "job.json", "lessons.msgpack", "recipe.json", "checkpoint"
CANDIDATE = "adapter.gguf"
PROGRESS, TRAINED, RESULT, LOG = "progress.json", "trained.json", "result.json", "worker.log"


class Job(msgspec.Struct, frozen=True):
    """`model`: path of the model's file. `recipe` None: judge the candidate that lies there. `start`: path of the
    adapter to start from and to beat; "": the bare model. `memory`: bytes that the worker may take. `rank` goes before
    the recipe's; 0: the largest that fits memory and `step_s` seconds for a step. `threads`: of training."""

    model: str
    recipe: Recipe | None
    start: str = ""
    memory: int = 1 << 62
    rank: int = 0
    step_s: float = 10.0
    threads: int = 1


class Progress(msgspec.Struct, frozen=True):
    """`done` and `total` in steps of the stage. `left_s`: seconds that the stage still takes; None: not known yet."""

    stage: Stage
    done: int = 0
    total: int = 0
    loss: float | None = None
    left_s: float | None = None


class Trained(msgspec.Struct, frozen=True):
    """`rss`, `predicted`: bytes, the peak of the training stage and what was expected."""

    id: str
    rank: int
    lessons: int
    steps: int
    seconds: float
    examples_per_s: float
    rss: int
    predicted: int


class Scores(msgspec.Struct, frozen=True):
    """`loss`: mean over held-out lessons, nats; `top1`: share of their tokens that come first; None: none were judged.
    `perplexity`: of plain text, per token."""

    loss: float | None
    top1: float | None
    perplexity: float


class Verdict(msgspec.Struct, frozen=True):
    """`judged`: held-out lessons. `present`: what is in use now, if that is not the bare model. `chance`: with which
    a candidate that is no better looks as good."""

    passed: bool
    reason: str
    judged: int
    bare: Scores | None = None
    present: Scores | None = None
    candidate: Scores | None = None
    chance: float | None = None


class Result(msgspec.Struct, frozen=True):
    """Either a `verdict`, or an `error` of the class `kind` (protocol.errors)."""

    verdict: Verdict | None = None
    trained: Trained | None = None
    kind: str = ""
    error: str = ""


def write(folder: Path, name: str, value: msgspec.Struct) -> None:
    """Durably. Raises StoreError."""
    files.put(folder / name, msgspec.json.encode(value))


def read(folder: Path, name: str, kind: type[S]) -> S | None:
    """None: not there, or not readable."""
    try:
        return msgspec.json.decode((folder / name).read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def prepare(folder: Path, job: Job, lessons: bytes, candidate: Path | None = None) -> None:
    """A folder with this job and nothing of another one. Raises StoreError."""
    clear(folder)
    try:
        folder.mkdir(parents=True, mode=0o700)
        if candidate is not None:
            shutil.copyfile(candidate, folder / CANDIDATE)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}; free some space, or check the disk") from None
    files.put(folder / LESSONS, lessons)
    write(folder, JOB, job)


def clear(folder: Path) -> None:
    """Leaves nothing of it. A worker that still is at it finds no place to write to. Raises StoreError."""
    going = folder.with_name(f"{folder.name}.going")
    try:
        if going.exists():  # since an end in between
            shutil.rmtree(going)
        if folder.exists():
            folder.rename(going)
            shutil.rmtree(going)
    except OSError as error:
        raise StoreError(f"{folder} cannot be removed: {error.strerror}; check the disk") from None
