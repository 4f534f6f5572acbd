"""The process that trains: `python -m agent.adapt.worker FOLDER [PARENT]`, where agent.adapt.job says what lies.

It has the lowest priority, is the first that the system kills when memory runs out, ends itself over its own bound,
and dies with its parent (the process id PARENT), also while it is stopped. Training and judging are two programs in one
process: it starts itself anew in between, so that nothing of torch takes memory while the engine is at work, and what
a killed worker has left is judged without training again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from agent.adapt import files, job, lesson
from agent.adapt.job import Job, Progress, Result, Trained
from agent.adapt.lesson import Lesson
from protocol import errors
from protocol.errors import NoTraining, SkerryError, TrainingError

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_IDLE_DISK = 3 << 13  # IOPRIO_CLASS_IDLE
_SET_IO_PRIORITY = {"x86_64": 251, "aarch64": 30}  # numbers of the system call
_LOOK_S = 0.1
_TELL_S = 0.5


def main() -> int:
    folder = Path(sys.argv[1])
    parent = int(sys.argv[2]) if len(sys.argv) > 2 else os.getppid()
    die_with(parent)
    step_back()
    try:
        given = job.read(folder, job.JOB, Job)
        if given is None:
            raise TrainingError(f"{folder / job.JOB}: not there, or not readable")
        _bound_memory(folder, given.memory)
        job.write(folder, job.RESULT, _work(folder, given))
    except SkerryError as error:
        return _failed(folder, error)
    except MemoryError:
        return _failed(folder, _too_large(0))
    except Exception as error:  # a library's; its message may quote what it worked on
        return _failed(folder, TrainingError(f"training failed in a library: {type(error).__name__}"))
    return 0


def _work(folder: Path, given: Job) -> Result:
    lessons = lesson.decode((folder / job.LESSONS).read_bytes())
    trained = job.read(folder, job.TRAINED, Trained)
    if given.recipe is not None and trained is None:
        _train(folder, given, lessons)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return _judge(folder, given, lessons, trained)


def _train(folder: Path, given: Job, lessons: list[Lesson]) -> None:
    tell = _Teller(folder)
    tell(Progress("load"))
    try:
        from agent.adapt.worker_train import trained as train
    except ImportError as error:
        raise NoTraining(f"training needs {error.name}: pip install 'skerry[train]'") from None
    from agent.adapt.gate import held_out

    taught = [one for one in lessons if not held_out(one)]
    if not taught:
        raise TrainingError(f"too few lessons to train on: {len(lessons)}, all of them held out")
    job.write(folder, job.TRAINED, train(folder, given, taught, tell))


def _judge(folder: Path, given: Job, lessons: list[Lesson], trained: Trained | None) -> Result:
    from agent.adapt.gate import judge

    tell = _Teller(folder)
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        spent = time.monotonic() - began
        tell(Progress("judge", done, total, left_s=spent / done * (total - done)))

    verdict = judge(
        Path(given.model),
        folder / job.CANDIDATE,
        Path(given.start) if given.start else None,
        lessons,
        given.threads,
        progress,
        own=given.recipe is not None,
    )
    if verdict.passed:
        _prepare_keys(Path(given.model), folder / job.CANDIDATE, given.threads)
    return Result(verdict, trained)


def _prepare_keys(model: Path, candidate: Path, threads: int) -> None:
    """What memory needs of an adapter, so that it need not be made while requests wait. Raises BadModelFile."""
    from agent.memory.key import prepare_keys
    from models.engine.open import EngineOptions, open_engine

    engine = open_engine(model, EngineOptions(context=256, sequences=1, threads=threads))
    try:
        with contextlib.suppress(OSError):  # then it is used without memory
            prepare_keys(engine, engine.attach(candidate), candidate)
    finally:
        engine.close()


class _Teller:
    """Writes progress down, not more often than anybody looks."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / job.PROGRESS
        self._stage = ""
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage or now >= self._next or progress.done == progress.total:
            self._stage, self._next = progress.stage, now + _TELL_S
            with contextlib.suppress(OSError):  # whoever waits goes on waiting
                files.tell(self._path, msgspec.json.encode(progress))


def die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def step_back() -> None:
    """Whatever of this the system allows."""
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if call := _SET_IO_PRIORITY.get(platform.machine()):
        ctypes.CDLL(None).syscall(call, 1, 0, _IDLE_DISK)


def _bound_memory(folder: Path, bound: int) -> None:
    """A thread that ends the process with a result when it takes more. The system's own limits count addresses, of
    which torch takes far more than memory, so they would refuse too early or never."""

    def watch() -> None:
        while True:
            time.sleep(_LOOK_S)
            if (taken := resident()) > bound:
                status = _failed(folder, _too_large(bound, taken))
                os._exit(status)

    threading.Thread(target=watch, name="memory", daemon=True).start()


def resident() -> int:
    """Bytes that this process has for itself: without what it shares with other users of the same files."""
    return _status("RssAnon")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _too_large(bound: int, taken: int = 0) -> TrainingError:
    took = f"training took {taken / 1e6:.0f} MB, more than the {bound / 1e6:.0f} MB" if taken else "there is no memory"
    return TrainingError(f"{took} that it may: set adapt.rank lower, or adapt.memory_mb higher")


def _failed(folder: Path, error: SkerryError) -> int:
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    with contextlib.suppress(SkerryError):  # a full disk: the status tells the kind of it
        job.write(folder, job.RESULT, Result(kind=kind.__name__, error=str(error)))
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
