"""One thread that owns the engine and batches the waiting steps of all sessions into its passes.

Work on a sequence is a generator: it yields the tokens the sequence shall hold and is sent the logits after the last
of them, valid until it yields again; what it returns is the result. In between the scheduler decides whose turn it is:

- steps of a few tokens go together, in the next pass;
- prompts go in chunks, in turns, and give way to steps every other pass, so no session waits for another's prompt;
- speculative work (a burst) runs only while nobody waits.
"""

from __future__ import annotations

import logging
import threading
import time
from asyncio import to_thread, wrap_future
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from models.engine.base import Engine, Floats, Sequence
from protocol.errors import ContextFull, SkerryError, UpstreamError

log = logging.getLogger(__name__)

T = TypeVar("T")
Job: TypeAlias = Generator[Seq[int], Floats, T]

_STEP = 8  # a feed of at most so many tokens is a step, a longer one a prompt
_PROMPT_PASS_S = 0.1  # how long a pass of prompt tokens may keep steps waiting
_STOPPED = "the LLM has been stopped"
_CHUNK = range(8, 257)  # bounds of the tokens in such a pass


@dataclass(eq=False, slots=True)
class _Work:
    sequence: Sequence
    job: Job[Any]
    future: Future[Any]
    speculative: bool
    missing: list[int] = field(default_factory=list)  # tokens still to be fed


class Scheduler:
    """`clock` measures passes, in seconds. Close it to stop the thread and free the engine."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        self._engine = engine
        self._clock = clock
        self._calls: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._work: deque[_Work] = deque()
        self._chunk = 2 * _CHUNK.start
        self._stepped = False  # the last pass was of steps
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    async def open(self, prompt: Seq[int], reserve: int) -> Sequence:
        """`Engine.open`. Raises what that raises."""
        future: Future[Sequence] = Future()

        def call() -> None:
            try:
                sequence = self._engine.open(prompt, reserve)
            except SkerryError as error:
                _fail(future, error)
            else:
                if not _finish(future, sequence):
                    sequence.close()  # whoever wanted it is gone

        self._submit(call, future)
        return await wrap_future(future)

    def submit(self, sequence: Sequence, job: Job[T], *, speculative: bool = False) -> Future[T]:
        """Runs `job` on `sequence`, in place of what still runs there. Cancelling the future drops the job."""
        future: Future[T] = Future()
        work = _Work(sequence, job, future, speculative)

        def call() -> None:
            self._drop(sequence)
            self._work.append(work)
            self._advance(work, None)

        self._submit(call, future)
        return future

    async def run(self, sequence: Sequence, job: Job[T], *, speculative: bool = False) -> T:
        """The result of `submit`, which cancelling the call cancels."""
        return await wrap_future(self.submit(sequence, job, speculative=speculative))

    def release(self, sequence: Sequence) -> None:
        """Drops what runs on `sequence` and gives it back to the engine."""

        def call() -> None:
            self._drop(sequence)
            sequence.close()

        self._submit(call, Future())

    async def close(self) -> None:
        """Lets the running pass end, fails what waits and frees the engine."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await to_thread(self._thread.join)

    def _submit(self, call: Callable[[], None], future: Future[Any]) -> None:
        with self._wake:
            if self.alive:
                self._calls.append((call, future))
                self._wake.notify()
            else:
                _fail(future, UpstreamError(_STOPPED))

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_calls():
                for work in [work for work in self._work if work.future.cancelled()]:
                    self._work.remove(work)
                if feeds := self._plan():
                    self._pass(feeds)
        except Exception as error:  # no session may wait for ever on a thread that is gone
            log.critical("the engine's thread failed: %s", type(error).__name__)
        finally:
            self._end()

    def _take_calls(self) -> bool:
        """Waits for something to do; False once it is time to stop."""
        with self._wake:
            while not (self._calls or self._work or self._stopping):
                self._wake.wait()
            if self._stopping:
                return False
            calls = list(self._calls)
            self._calls.clear()
        for call, _ in calls:
            call()
        return True

    def _end(self) -> None:
        with self._wake:
            self._stopping = True
            waiting = [future for _, future in self._calls] + [work.future for work in self._work]
        for future in waiting:
            _fail(future, UpstreamError(_STOPPED))
        self._engine.close()

    def _drop(self, sequence: Sequence) -> None:
        for work in [work for work in self._work if work.sequence is sequence]:
            self._work.remove(work)
            _fail(work.future, UpstreamError("the session was closed or asked anew"))

    def _plan(self) -> list[tuple[_Work, list[int]]]:
        """Who is fed what in the next pass."""
        wanted = [work for work in self._work if not work.speculative] or list(self._work)
        steps = [work for work in wanted if len(work.missing) <= _STEP]
        prompts = [work for work in wanted if len(work.missing) > _STEP]
        self._stepped = bool(steps) and not (prompts and self._stepped)
        if self._stepped or not prompts:
            return [(work, work.missing) for work in steps]
        first = prompts[0]
        self._work.remove(first)
        self._work.append(first)
        return [(first, first.missing[: self._chunk])]

    def _pass(self, feeds: list[tuple[_Work, list[int]]]) -> None:
        started = self._clock()
        try:
            steps = self._engine.forward([(work.sequence, tokens) for work, tokens in feeds])
        except RuntimeError as error:
            log.error("a pass of %d sequences failed: %s", len(feeds), error)
            for work, _ in feeds:
                self._drop(work.sequence)
            return
        if len(feeds) == 1 and len(feeds[0][1]) > _STEP:
            rate = len(feeds[0][1]) / max(self._clock() - started, 1e-6)
            self._chunk = min(max(int(rate * _PROMPT_PASS_S), _CHUNK.start), _CHUNK.stop - 1)
        for (work, tokens), step in zip(feeds, steps, strict=True):
            work.missing = work.missing[len(tokens) :]
            if not work.missing:
                self._advance(work, step.logits)

    def _advance(self, work: _Work, logits: Floats | None) -> None:
        """Lets the job go on; it leaves when it is done or fails."""
        try:
            target = next(work.job) if logits is None else work.job.send(logits)
            if len(target) > work.sequence.reserved:
                raise ContextFull(
                    f"prompt and answer have {len(target)} tokens, the session has room for {work.sequence.reserved}"
                )
            work.missing = work.sequence.align(target)
        except StopIteration as stop:
            self._work.remove(work)
            _finish(work.future, stop.value)
        except Exception as error:
            self._work.remove(work)
            _fail(work.future, error)


def _finish(future: Future[T], result: T) -> bool:
    """False if the future was cancelled."""
    try:
        future.set_result(result)
    except InvalidStateError:
        return False
    return True


def _fail(future: Future[Any], error: Exception) -> None:
    with suppress(InvalidStateError):
        future.set_exception(error)
