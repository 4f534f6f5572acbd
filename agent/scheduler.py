"""One thread owns the engine and serves every answer that is being written.

Each turn it feeds, in one batched pass, all answers that have tokens to feed, so they advance together; a long prompt
goes in slices so that it does not hold up the others. Answers that wait for a reply cost nothing until it comes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent.loop import Feed, Need, Wait
from models.engine.base import Engine, Mix, Step
from models.engine.base import Sequence as Place
from protocol.errors import BadAdapter, Overloaded

log = logging.getLogger(__name__)

T = TypeVar("T")

_SLICE = 64  # prompt tokens per turn while somebody else is waiting for a token
_SLICE_ALONE = 128  # else: bounds how long a newcomer waits and a cancelled prompt goes on, at one step's extra cost
_RETRY_AFTER = 2.0  # seconds that a client is told to wait when the queue is full


@dataclass(eq=False)
class Job:
    """One answer. `choose` says which adapters it wants when it is its turn, `start` makes its token loop once there is
    a place; `finish` is called with why it ended or with the error. All run on the scheduler's thread."""

    prompt: Sequence[int]
    max_tokens: int
    start: Callable[[Place], Generator[Need, Step | None, str]]
    finish: Callable[[str | Exception], None]
    choose: Callable[[], Mix] = tuple
    mix: Mix | None = None  # chosen
    cancelled: bool = False
    woken: bool = False
    place: Place | None = None
    loop: Generator[Need, Step | None, str] | None = None
    need: Need | None = None
    left: list[int] = field(default_factory=list)  # tokens of the present Feed that are still to be fed


class Scheduler:
    """`queue`: how many answers may wait for a place before Overloaded is raised. `busy` may be set, and is then told
    how many answers are being written or wait, whenever one comes or ends."""

    def __init__(self, engine: Engine, clock: Callable[[], float], queue: int = 16) -> None:
        self.engine = engine
        self._clock = clock
        self._queue_limit = queue
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []
        self._work: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self.busy: Callable[[int], None] = lambda answers: None
        self._closing = False
        self._news = False  # something changed since the thread last looked round
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once it was closed or its thread failed."""
        return self._thread.is_alive() and not self._closing

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def submit(self, job: Job) -> None:
        """Raises Overloaded if too many wait already, ContextFull if the job can never fit."""
        self.engine.check_fits(len(job.prompt), job.max_tokens)
        with self._changed:
            if not self.alive or len(self._queue) >= self._queue_limit + self.engine.free:
                raise Overloaded("too many requests are waiting: try again shortly", _RETRY_AFTER)
            self._queue.append(job)
            self._notify()
        self.busy(self.active + self.queued)

    def cancel(self, job: Job) -> None:
        """The job's place is free after the present turn."""
        with self._changed:
            job.cancelled = True
            self._notify()

    def wake(self, job: Job) -> None:
        """Something that the job waits for has come."""
        with self._changed:
            job.woken = True
            self._notify()

    def run(self, work: Callable[[], T]) -> T:
        """Does something on the engine's thread between two passes, and waits for it. Raises what it raises, Overloaded
        if the thread ended before."""
        if threading.current_thread() is self._thread:
            return work()
        future: Future[T] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if not self.alive:
                raise Overloaded("the agent is shutting down", _RETRY_AFTER)
            self._work.append((do, future))
            self._notify()
        return future.result()

    def close(self) -> None:
        """Ends every job and the thread; the engine stays open."""
        with self._changed:
            self._closing = True
            self._notify()
        self._thread.join()

    def _notify(self) -> None:
        self._news = True
        self._changed.notify()

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # nobody may wait for ever on a thread that is gone
            with self._changed:
                self._closing = True
            for job in [*self._active, *self._queue]:
                self._end(job, Overloaded("the agent is shutting down", _RETRY_AFTER))
            for _, future in self._work:
                future.set_exception(Overloaded("the agent is shutting down", _RETRY_AFTER))

    def _serve(self) -> None:
        while not self._closing:
            with self._changed:
                self._news = False
                cancelled = [job for job in (*self._active, *self._queue) if job.cancelled]
            for job in cancelled:
                self._end(job, "cancelled")
            while self._work:
                self._work.popleft()[0]()
            self._admit()
            self._resume_waiting()
            ready = [job for job in self._active if job.left]
            if ready:
                self._turn(ready)
            else:
                self._sleep()

    def _admit(self) -> None:
        """Gives waiting jobs a place, first come first served."""
        while self._queue:
            job = self._queue[0]
            try:
                job.place = self._open(job)
            except Overloaded:
                return
            except Exception as error:
                self._failed(job, error)
                continue
            with self._changed:
                self._queue.popleft()
                self._active.append(job)
            try:
                job.loop = job.start(job.place)
            except Exception as error:
                self._failed(job, error)
            else:
                self._resume(job, None)

    def _open(self, job: Job) -> Place:
        """Chosen once, however often there is no room; anew if what was chosen has been taken away since."""
        if job.mix is not None:
            with suppress(BadAdapter):
                return self.engine.open(job.prompt, job.max_tokens, job.mix)
        job.mix = job.choose()
        return self.engine.open(job.prompt, job.max_tokens, job.mix)

    def _resume_waiting(self) -> None:
        now = self._clock()
        for job in list(self._active):
            if isinstance(job.need, Wait) and (job.woken or now >= job.need.until):
                job.woken = False
                self._resume(job, None)

    def _turn(self, ready: list[Job]) -> None:
        """One batched pass over all jobs that have something to feed."""
        size = _SLICE if len(self._active) > 1 else _SLICE_ALONE
        feeds = [(job.place, job.left[:size]) for job in ready if job.place is not None]
        try:
            steps = self.engine.forward(feeds)
        except Exception as error:
            for job in ready:
                self._failed(job, error)
            return
        for job, step in zip(ready, steps, strict=True):
            del job.left[:size]
            if not job.left:
                self._resume(job, step)

    def _resume(self, job: Job, step: Step | None) -> None:
        """Runs the job's token loop up to its next need."""
        assert job.loop is not None
        try:
            job.need = job.loop.send(step)
            if isinstance(job.need, Feed):
                job.left = list(job.need.tokens)
        except StopIteration as end:
            self._end(job, end.value)
        except Exception as error:
            self._failed(job, error)

    def _failed(self, job: Job, error: Exception) -> None:
        """One answer's failure must not end the others'. Its message is not logged: it may quote text."""
        log.error("an answer failed: %s", type(error).__name__)
        self._end(job, error)

    def _end(self, job: Job, outcome: str | Exception) -> None:
        if job.loop is not None:
            job.loop.close()
        if job.place is not None:
            job.place.close()
        with self._changed:
            for jobs in (self._active, self._queue):
                if job in jobs:
                    jobs.remove(job)
            self._news = True  # there may be a place for the next one now: no sleep before the queue is looked at
        self.busy(self.active + self.queued)
        job.left = []
        try:
            job.finish(outcome)
        except Exception as error:
            log.error("whoever waited for an answer failed: %s", type(error).__name__)

    def _sleep(self) -> None:
        """Until something changes or the first waiting job's time is up."""
        untils = [job.need.until for job in self._active if isinstance(job.need, Wait)]
        timeout = max(0.0, min(untils) - self._clock()) if untils else None
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout)
