"""The agent learns by itself: new lessons, an idle machine, a training, the gate, and a new adapter in use.

requests ──► activity ──────────────► pause ──┐
lessons ──► enough new ones, idle? ──► Session ──► Supervisor ──► worker
adapters from elsewhere ──► consider ──┘   └──► AdapterStore ──► on_change
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.adapt import files, job
from agent.adapt.idle import Machine
from agent.adapt.job import Progress, Result, Verdict
from agent.adapt.recipe import Recipe
from agent.adapt.session import INSTALL, Limits, Outcome, Session, Source, installed, unlearned
from agent.adapt.store import AdapterStore
from agent.adapt.supervise import Stopped, Supervisor
from protocol.errors import BadAdapter, BadModelFile, SkerryError, StoreInUse, TrainingError

log = logging.getLogger(__name__)

STATUS = "status.json"
_LOOK_S = 1.0
_MACHINE_S = 5.0  # load is a mean over as long
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 6 * 3600.0  # after a training that failed


class Status(msgspec.Struct, frozen=True):
    """`doing`: `idle`, `training`, `judging`, `paused` or `off`. `waits`: why it does not train now: `too few lessons`,
    `in use`, `hot`, `on battery`, `busy`, `training elsewhere`, `not installed`, `failed`, `switched off`. `new`:
    lessons since the last training, of `enough` that begin one. `last`, `error`: what came of the last one."""

    doing: str = "off"
    waits: str = ""
    slot: str = ""
    progress: Progress | None = None
    new: int = 0
    enough: int = 0
    trainings: int = 0
    committed: int = 0
    last: Result | None = None
    error: str = ""


def status_of(folder: Path) -> Status:
    """As the agent last wrote it."""
    return job.read(folder, STATUS, Status) or Status()


class Adapting:
    """`start` and `close` frame its thread; `activity` and `consider` are for any thread and return at once.

    `train`: whether it trains by itself; it judges and notices changes anyway. `enough`: new lessons that begin a
    training. `on_change` hears of what is in use, slot to file, at the start and after each change, also one that
    another process made.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        store: AdapterStore,
        lessons: Source,
        machine: Machine,
        limits: Callable[[], Limits],
        *,
        train: bool = True,
        enough: int = 64,
        idle_s: float = 60.0,
        recipe: Recipe | None = None,
        on_change: Callable[[dict[str, Path]], None] = lambda in_use: None,
        clock: Callable[[], float] = time.monotonic,
        supervisor: Supervisor | None = None,
    ) -> None:
        self.store = store
        self._folder = folder
        self._model = model
        self._lessons = lessons
        self._machine = machine
        self._limits = limits
        self._train = train
        self._enough = enough
        self._idle_s = idle_s
        self._recipe = recipe or Recipe()
        self._on_change = on_change
        self._clock = clock
        self._supervisor = supervisor or Supervisor(self._progressed)
        self._considered: deque[tuple[Path, str]] = deque()
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of the next two, and of pausing by them
        self._active = 0
        self._active_until = clock()
        self._number = -1
        self._pause, self._retry_at = _FIRST_PAUSE_S, 0.0
        self._machine_at = float("-inf")
        self._machine_says: str | None = None
        self._written: Status | None = None
        self.status = msgspec.structs.replace(status_of(folder), doing="idle", waits="", progress=None, enough=enough)
        self._thread = threading.Thread(target=self._run, name="adapting", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="adapting-watch", daemon=True)

    def start(self) -> None:
        """What is in use already was told of when this returns."""
        self._survive(self._notice)
        self._thread.start()
        self._watcher.start()

    def activity(self, active: int) -> None:
        """How many requests are being served or wait, told whenever that changes. A training stops at once."""
        with self._lock:
            self._active = active
            self._active_until = self._clock()
            if active:
                self._supervisor.pause()

    def consider(self, path: Path, slot: str) -> None:
        """Judges an adapter from elsewhere when the device is idle, and uses it in that slot if it passes. The file has
        to stay until then."""
        self._considered.append((path, slot))

    def close(self) -> None:
        """Ends a training; it goes on where it was after the next start. Idempotent."""
        self._closing.set()
        self._supervisor.close()
        for thread in (self._thread, self._watcher):
            if thread.is_alive():
                thread.join()
        self._set(doing="off", progress=None)

    # The watcher: pauses and resumes, and notices what others changed.

    def _watch(self) -> None:
        while True:
            self._survive(self._look)
            if self._closing.wait(_LOOK_S):
                return

    def _survive(self, do: Callable[[], None]) -> None:
        try:
            do()
        except (SkerryError, OSError) as error:
            log.warning("adapters: %s", error)
        except Exception as error:  # of whoever hears of changes
            log.error("adapters: %s", type(error).__name__)

    def _look(self) -> None:
        machine = self._machine_now()
        with self._lock:
            why = self._in_use() or machine
            if why:
                self._supervisor.pause()
            else:
                self._supervisor.resume()
        if self.status.doing in ("training", "judging", "paused"):
            working = "judging" if self.status.progress and self.status.progress.stage == "judge" else "training"
            self._set(doing="paused" if why else working, waits=why or "")
        self._notice()

    def _notice(self) -> None:
        if self.store.number != self._number:
            in_use = self.store.in_use()
            self._number = self.store.number
            self._on_change(in_use)

    def _machine_now(self) -> str | None:
        now = self._clock()
        if now - self._machine_at >= _MACHINE_S:
            self._machine_at, self._machine_says = now, self._machine.why_not()
        return self._machine_says

    def _in_use(self) -> str | None:
        return "in use" if self._active or self._clock() - self._active_until < self._idle_s else None

    # The thread that trains, which the worker dies with

    def _run(self) -> None:
        while not self._closing.wait(_LOOK_S):
            try:
                self._next()
                self._pause = _FIRST_PAUSE_S
            except Stopped:
                return
            except StoreInUse:
                self._set(doing="idle", waits="training elsewhere", progress=None)
            except SkerryError as error:
                self._failed(error)
            except Exception as error:
                log.error("training: %s", type(error).__name__)
                self._failed(SkerryError(f"a failure within: {type(error).__name__}"))

    def _next(self) -> None:
        waits = self._in_use() or self._machine_says
        if self._considered and not waits:
            return self._consider()
        waits = waits or self._waits()
        self._set(doing="idle", waits=waits or "", progress=None)
        if not waits:
            with contextlib.closing(self._session()) as session:
                self._learn(session)
        return None

    def _waits(self) -> str | None:
        if not self._train:
            return "switched off"
        if not installed():
            if self.status.error != INSTALL:
                log.warning("%s", INSTALL)
                self._set(error=INSTALL)
            return "not installed"
        if self._clock() < self._retry_at:
            return "failed"
        new = unlearned(self._folder, self._lessons)
        self._set(new=new)
        return "too few lessons" if new < self._enough else None

    def _session(self) -> Session:
        return Session(self._folder, self._model, self.store, self._supervisor, self._limits())

    def _consider(self) -> None:
        with contextlib.closing(self._session()) as session:
            path, slot = self._considered.popleft()
            self._set(doing="judging", slot=slot, error="")
            try:
                self._ended(session.consider(path, self._lessons.take(private=True), slot))
            except (BadAdapter, TrainingError, BadModelFile) as error:  # no reason to put off what is learned here
                log.warning("an adapter for slot %s is not used: %s", slot, error)
                self._set(error=str(error))

    def _learn(self, session: Session) -> None:
        def begins(slot: str) -> None:
            self._set(doing="training", slot=slot, error="")

        slots = 0
        for outcome in session.learn_all(self._lessons, self._recipe, begins):
            slots += 1
            self._ended(outcome)
        self._set(trainings=self.status.trainings + bool(slots))

    def _ended(self, outcome: Outcome) -> None:
        good = not outcome.adapter.dropped
        self._set(last=outcome.result, committed=self.status.committed + good, progress=None)
        verdict = outcome.result.verdict
        log.info("adapter %s: %s: %s", outcome.adapter.id[:12], "in use" if good else "dropped", _reason(verdict))

    def _failed(self, error: SkerryError) -> None:
        log.warning("training: %s", error)
        self._retry_at = self._clock() + self._pause
        self._pause = min(_LONGEST_PAUSE_S, 2 * self._pause)
        self._set(doing="idle", waits="failed", error=str(error), progress=None)

    def _progressed(self, progress: Progress) -> None:
        self._set(progress=progress)

    def _set(self, **changes: object) -> None:
        self.status = msgspec.structs.replace(self.status, **changes)
        if self.status != self._written:
            self._written = self.status
            with contextlib.suppress(OSError):  # nobody waits for it
                files.tell(self._folder / STATUS, msgspec.json.encode(self.status))


def _reason(verdict: Verdict | None) -> str:
    return verdict.reason if verdict is not None else ""
