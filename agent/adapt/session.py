"""One training from lessons to a slot: the job is written, supervised, and what passed the gate is put into use."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.adapt import files, job
from agent.adapt import lesson as encoding
from agent.adapt.gate import LEAST, held_out
from agent.adapt.job import Job, Result
from agent.adapt.lesson import Lesson
from agent.adapt.noise import is_frozen
from agent.adapt.recipe import Recipe
from agent.adapt.store import FLEET, OWN, PRIVATE, AdapterStore, Kept, Origin
from agent.adapt.supervise import Supervisor
from agent.config import Adapt, AgentConfig, device_folder
from agent.doctor.machine import read_machine
from agent.memory.key import keys_beside
from models import adapter as adapters
from models.engine.open import kind_of
from models.engine.threads import physical_cores
from protocol.errors import NoTraining, TrainingError
from protocol.folder_lock import FolderLock, holder

LOCK = "training.lock"
INSTALL = "training needs torch: pip install 'skerry[train]'"
NO_ADAPTERS = "models in ONNX take no adapters, so none are trained; name a GGUF file in model.name to learn some"

_LEARNED = "learned"
_LITTLE = 1 << 30  # bytes that training gets where the system does not tell what is free


class Source(Protocol):
    """Where lessons come from (agent.adapt.lessons.Lessons)."""

    @property
    def revision(self) -> int: ...

    def take(self, private: bool) -> list[Lesson]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory` in bytes. `rank` 0: the largest that fits memory and `step_s` seconds. `threads` of training."""

    memory: int
    rank: int
    step_s: float
    threads: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """`adapter`: its manifest; `dropped` there tells whether the gate refused it."""

    slot: str
    adapter: Kept
    result: Result


class Session:
    """Held while something is trained or judged; one process at a time. `folder`: the adapters' folder; the work is
    done in folders below it. Raises StoreInUse if another process trains, StoreError."""

    def __init__(self, folder: Path, model: Path, store: AdapterStore, supervisor: Supervisor, limits: Limits) -> None:
        self._folder = folder
        self._model = model
        self._store = store
        self._supervisor = supervisor
        self._limits = limits
        self._lock = FolderLock(folder, LOCK, "the training", "device.folder")

    def close(self) -> None:
        self._lock.close()

    def learn_all(self, source: Source, recipe: Recipe, begins: Callable[[str], None]) -> Iterator[Outcome]:
        """What can be shared first; then what only this device may know, on top of it. `begins` hears of each slot.
        Raises NoTraining, and as `learn`."""
        if not installed():
            raise NoTraining(INSTALL)
        revision = source.revision
        for slot, lessons in ((OWN, source.take(private=False)), (PRIVATE, source.take(private=True))):
            if can_be_judged(lessons) and (slot == OWN or any(one.private for one in lessons)):
                begins(slot)
                yield self.learn(lessons, recipe, slot)
        files.put(self._folder / _LEARNED, str(revision).encode())

    def learn(self, lessons: Sequence[Lesson], recipe: Recipe, slot: str = OWN) -> Outcome:
        """Trains on all but the held-out lessons, from what is in the slot; or goes on with what was ended before, if
        all of its lessons are still among these. Raises TrainingError, StoreError, Stopped."""
        private = any(one.private for one in lessons)
        if private and slot != PRIVATE:
            raise TrainingError(f"private lessons are for the slot {PRIVATE} alone")
        if not can_be_judged(lessons):
            raise TrainingError(
                f"too few lessons: of {len(lessons)}, a fifth is held out to judge by, and {LEAST} of those are needed"
            )
        start = self._start(slot, recipe)
        work, given = self._folder / f"work-{slot}", self._job(recipe, start)
        if _may_go_on(work, given, lessons):
            job.write(work, job.JOB, given)
        else:
            job.prepare(work, given, encoding.encode(lessons))
        return self._settle(work, slot, "own", private, self._supervisor.run(work))

    def consider(self, candidate: Path, lessons: Sequence[Lesson], slot: str) -> Outcome:
        """Judges an adapter from elsewhere. Raises BadAdapter, TrainingError, StoreError, Stopped."""
        present = self._store.in_use().get(slot)
        work = self._folder / "work-judge"
        job.prepare(work, self._job(None, present), encoding.encode(lessons), candidate)
        return self._settle(work, slot, "fleet", False, self._supervisor.run(work))

    def _start(self, slot: str, recipe: Recipe) -> Path | None:
        """What private lessons add begins with what the others taught. With a frozen A it begins with what all agreed
        on, as it is the difference from that which is sent; an adapter of another A is of no use then."""
        in_use = self._store.in_use()
        if not recipe.freeze_a:
            return in_use.get(slot) or in_use.get(OWN)
        known = (in_use.get(name) for name in dict.fromkeys((FLEET, slot, OWN)))
        return next((path for path in known if path is not None and is_frozen(adapters.read(path))), None)

    def _job(self, recipe: Recipe | None, start: Path | None) -> Job:
        limits = self._limits
        return Job(
            model=str(self._model),
            recipe=recipe,
            start=str(start) if start else "",
            memory=limits.memory,
            rank=limits.rank,
            step_s=limits.step_s,
            threads=limits.threads,
        )

    def _settle(self, work: Path, slot: str, origin: Origin, private: bool, result: Result) -> Outcome:
        assert result.verdict is not None
        keep = self._store.add if result.verdict.passed else self._store.drop
        lessons = result.trained.lessons if result.trained else 0
        kept = keep(work / job.CANDIDATE, origin, lessons=lessons, private=private, verdict=result.verdict)
        if result.verdict.passed:
            with contextlib.suppress(OSError):  # then it is used without memory
                keys_beside(work / job.CANDIDATE).replace(keys_beside(self._store.path(kept.id)))
            self._store.commit(slot, kept.id, result.verdict.reason)
        job.clear(work)
        return Outcome(slot, kept, result)


def adapters_folder(config: AgentConfig) -> Path:
    return device_folder(config) / "adapters"


def limits_of(adapt: Adapt) -> Limits:
    """As configured, or as the machine is now."""
    free = read_machine(Path("/"), "", 1).available or 2 * _LITTLE
    return Limits(
        memory=memory_of(adapt, free),
        rank=adapt.rank,
        step_s=adapt.step_s,
        threads=adapt.threads or physical_cores(),
    )


def memory_of(adapt: Adapt, free: int) -> int:
    """Bytes that training may take, of `free` ones."""
    return adapt.memory_mb * 10**6 or free // 2


def recipe_of(adapt: Adapt) -> Recipe:
    """Noise protects an adapter with a frozen A alone."""
    return Recipe(freeze_a=adapt.noise > 0.0)


def takes_adapters(model: Path) -> bool:
    """Whether the engine that runs the model does. Raises BadModelFile."""
    return kind_of(model) == "gguf"


def check_takes_adapters(model: Path) -> None:
    """Raises TrainingError, BadModelFile."""
    if not takes_adapters(model):
        raise TrainingError(NO_ADAPTERS)


def installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def unlearned(folder: Path, source: Source) -> int:
    """Lessons that came since the last training that ended. Raises StoreError."""
    try:
        learned = int((folder / _LEARNED).read_text())
    except (OSError, ValueError):
        learned = 0
    revision = source.revision
    return revision - learned if revision >= learned else revision  # else: another file of lessons than then


def can_be_judged(lessons: Sequence[Lesson]) -> bool:
    """Whether enough of them are held out."""
    return sum(map(held_out, lessons)) >= LEAST


def trainer(folder: Path) -> int | None:
    """The process that trains there now, if one does."""
    return holder(folder, LOCK)


def erase(folder: Path) -> None:
    """What trainings have left of lessons; one that is under way fails. Raises StoreError."""
    for work in folder.glob("work-*"):
        job.clear(work)


def _may_go_on(work: Path, given: Job, lessons: Sequence[Lesson]) -> bool:
    """None of its lessons was forgotten since, and it is the same task under maybe other limits."""
    before = job.read(work, job.JOB, Job)
    if before is None or (before.recipe, before.start, before.model) != (given.recipe, given.start, given.model):
        return False
    try:
        old = encoding.decode((work / job.LESSONS).read_bytes())
    except (OSError, TrainingError):
        return False
    known = {encoding.encode([one]) for one in lessons}
    return all(encoding.encode([one]) in known for one in old)
