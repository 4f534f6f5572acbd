"""The thread that writes: what was learned, used and judged becomes durable a moment later, in one transaction.

A full or failing disk leaves changes queued, up to a bound, until writing succeeds again.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agent.memory.store import Store, Write, damaged, troubled
from protocol.errors import StoreError

_LINGER_S = 0.5  # how long a change waits for others to share its commit
_FIRST_PAUSE_S = 1.0  # after a failed commit, doubled by the next
_LONGEST_PAUSE_S = 60.0
_IDLE_S = 600.0  # the memory's clock is saved, and old entries go, at least this often
_BATCH = 2048  # changes per transaction
_BACKLOG = 8192  # changes that wait for a disk that refuses them

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@dataclass(slots=True, eq=False)
class Change:
    """`after` runs in the writer's thread once `write` is durable, `undo` when it never will be."""

    write: Write
    after: Callable[[], None] = _nothing
    undo: Callable[[], None] = _nothing


@dataclass(slots=True, eq=False)
class Waiter:
    """`error` is set before `done`."""

    change: Change
    done: threading.Event = field(default_factory=threading.Event)
    error: str = ""


class Writer:
    """`epilogue` writes what goes with every commit; `tend` runs after it, in the same thread; `replace` gives the
    store that takes over when a file turns out to be damaged, and the changes that were meant for the old one."""

    def __init__(
        self,
        store: Store,
        *,
        epilogue: Write,
        tend: Callable[[Store], None],
        replace: Callable[[Store], tuple[Store, list[Change]]],
    ) -> None:
        self._store = store
        self._epilogue = epilogue
        self._tend = tend
        self._replace = replace
        self._wake = threading.Condition()
        self._queue: list[Change] = []
        self._waiters: dict[Change, Waiter] = {}
        self._retrying = False
        self._careful = 0  # changes that are written one by one, since one among them can't be
        self._closing = False
        self.errors = 0  # commits that failed
        self._thread = threading.Thread(target=self._run, name="memory-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def full(self) -> bool:
        """The disk has refused for so long that nothing more should be queued that one can do without."""
        return len(self._queue) >= _BACKLOG

    def put(self, change: Change) -> None:
        """Never waits."""
        with self._wake:
            self._queue.append(change)
            self._wake.notify()

    def submit(self, change: Change) -> Waiter:
        """Never waits; `wait` does."""
        waiter = Waiter(change)
        with self._wake:
            if self._closing:
                raise StoreError("the memory is closed")
            self._queue.append(change)
            self._waiters[change] = waiter
            self._wake.notify()
        return waiter

    def wait(self, waiter: Waiter) -> None:
        """The change is durable when this returns. Raises StoreError, and the change is undone."""
        waiter.done.wait()
        if waiter.error:
            raise StoreError(waiter.error)

    def do(self, write: Write) -> None:
        self.wait(self.submit(Change(write)))

    def flush(self) -> None:
        """All that was queued so far is durable when this returns. Raises StoreError."""
        self.do(lambda store: None)

    def discard(self) -> list[Change]:
        """Takes back what is queued."""
        with self._wake:
            queue, self._queue = self._queue, []
            return queue

    def close(self) -> None:
        """What is queued is written if the disk takes it."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._store.close()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            batch, closing = self._next(pause)
            try:
                if self._commit(batch):
                    self._tend(self._store)
            except sqlite3.Error as error:
                self._failed([], error)
            except Exception:  # a fault of this program: later changes must find a writer all the same
                _log.exception("the memory's writer met an error")
            pause = min(_LONGEST_PAUSE_S, 2 * pause) if self._retrying else _FIRST_PAUSE_S
            if closing and (not self._queue or self._retrying):
                self._give_up(self._queue, "the memory was closed while its disk refused to be written")
                return

    def _next(self, pause: float) -> tuple[list[Change], bool]:
        """Waits for changes, and for more of them unless somebody waits for theirs."""
        with self._wake:
            if self._retrying:
                self._wake.wait_for(self._urgent, pause)
            elif self._wake.wait_for(lambda: bool(self._queue) or self._urgent(), _IDLE_S):
                self._wake.wait_for(self._urgent, _LINGER_S)
            size = 1 if self._careful else _BATCH
            self._careful = max(0, self._careful - 1)
            batch, self._queue = self._queue[:size], self._queue[size:]
            return batch, self._closing

    def _urgent(self) -> bool:
        return bool(self._waiters) or self._closing

    def _commit(self, batch: list[Change]) -> bool:
        try:
            self._store.apply([*(change.write for change in batch), self._epilogue])
        except sqlite3.Error as error:
            self._failed(batch, error)
            return False
        except Exception:
            self._give_up(batch, "an internal error, see the log")
            raise
        self._retrying = False
        for change in batch:
            change.after()
            self._tell(change)
        return True

    def _failed(self, batch: list[Change], error: sqlite3.Error) -> None:
        self.errors += 1
        reason = f"the memory cannot be written: {error}"
        if damaged(error):
            self._start_over(batch)
        elif troubled(error):
            self._trouble(reason)
            self._put_back(batch)
            self._give_up(self._take_waited(), f"{reason}; free some space, or check the disk")
        elif len(batch) > 1:
            self._careful = len(batch)
            self._put_back(batch)
        else:
            _log.error("the memory's database refused a change: %s", error)
            self._give_up(batch, reason)

    def _start_over(self, batch: list[Change]) -> None:
        try:
            self._store, outdated = self._replace(self._store)
        except (StoreError, OSError, sqlite3.Error) as error:
            outdated = []
            self._trouble(f"no new memory can be made: {error}")
        self._give_up([*batch, *outdated], "the memory's file was damaged, and an empty one takes its place")

    def _trouble(self, reason: str) -> None:
        if not self._retrying:
            _log.warning("%s; what is learned stays in RAM until it can", reason)
        self._retrying = True

    def _put_back(self, changes: list[Change]) -> None:
        with self._wake:
            self._queue = changes + self._queue

    def _take_waited(self) -> list[Change]:
        """Out of the queue: those that somebody waits for."""
        with self._wake:
            waited = [change for change in self._queue if change in self._waiters]
            self._queue = [change for change in self._queue if change not in self._waiters]
            return waited

    def _give_up(self, changes: Iterable[Change], reason: str) -> None:
        for change in changes:
            change.undo()
            self._tell(change, reason)

    def _tell(self, change: Change, error: str = "") -> None:
        with self._wake:
            waiter = self._waiters.pop(change, None)
        if waiter is not None:
            waiter.error = error
            waiter.done.set()
