"""The ledger: what came of each escalation and audit, and how uncertain all steps were.

    note, passed ──► queue in RAM ──► SQLite
    (the engine's thread)     └── writer thread ──┘

Bounded by rows that the LLM answered and by others, of which the oldest go first. If the disk refuses, rows stay in
RAM within the same bound. No clock is asked but for when to write.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import deque
from pathlib import Path

from agent.learn.ledger_rows import Columns, Entry, Row, Since
from agent.learn.ledger_store import LedgerFile
from agent.learn.sample import Histogram, Sample
from agent.memory.store import damaged
from protocol.errors import StoreError

log = logging.getLogger(__name__)

ROWS = 20_000  # of either kind
_LINGER_S = 2.0  # how long rows wait for others to share their commit
_LONGEST_PAUSE_S = 60.0  # after failed writes
_STEPS = 1_000  # that were not sent, after which their histogram is written even without a row
_QUEUE = 100_000  # steps that wait for the writer; what is older is forgotten


class Ledger:
    """`note` and `passed` return at once and are for one thread, all else waits for the disk and may be called by any.

    `errors`: writes that the disk refused. `refused`: rows that made no sense. Raises StoreError if the file can't be
    opened, StoreInUse if another process has it.
    """

    def __init__(self, path: Path, rows: int = ROWS) -> None:
        self.errors = self.refused = 0
        self._rows = rows
        self._queue: deque[Row | tuple[float, float]] = deque(maxlen=_QUEUE)
        self._file = LedgerFile(path)
        self._lock = threading.Lock()  # of what follows, and of the file
        self._seen, self._since = self._file.seen()
        self._unsaved: deque[Entry] = deque(maxlen=rows)
        self._unsaved_steps = 0
        self._damaged = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def note(self, row: Row) -> None:
        """A step that was to be sent, once it is known what came of it."""
        self._queue.append(row)

    def passed(self, u: float, least: float) -> None:
        """A step that was not sent. `least`: as in Row."""
        self._queue.append((u, least))

    def sample(self) -> Sample:
        """Of all that was noted and is not too old. Raises StoreError."""
        with self._lock:
            self._take()
            new = [entry.fields for entry in self._unsaved]
            try:
                return Columns.of([*self._file.rows(), *new]).sample(self._rows)
            except sqlite3.Error as error:
                self._failed(error)
                raise StoreError(f"the ledger cannot be read: {error}") from None

    def seen(self) -> Histogram:
        """Of u over all steps, sent or not."""
        with self._lock:
            self._take()
            return Histogram(self._seen.counts)

    def get(self, name: str) -> bytes | None:
        """Raises StoreError."""
        with self._lock:
            try:
                return self._file.get(name)
            except sqlite3.Error as error:
                raise StoreError(f"the ledger cannot be read: {error}") from None

    def put(self, name: str, value: bytes) -> None:
        """Durable when it returns. Raises StoreError."""
        with self._lock:
            try:
                self._file.put(name, value)
            except sqlite3.Error as error:
                self._failed(error)
                raise StoreError(f"the ledger cannot be written: {error}; free some space, or check the disk") from None

    def flush(self) -> bool:
        """Writes now. Is all that was noted on the disk?"""
        with self._lock:
            self._take()
            return self._save()

    def close(self) -> None:
        """Writes what is in RAM, if the disk takes it. Idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            self.flush()
            self._file.close()

    def _run(self) -> None:
        pause = _LINGER_S
        while not self._closing.wait(pause):
            with self._lock:
                self._take()
                due = self._unsaved or self._unsaved_steps >= _STEPS or self._damaged
                saved = self._save() if due else True
            pause = _LINGER_S if saved else min(_LONGEST_PAUSE_S, 2 * pause)

    # From here on: with the lock.

    def _take(self) -> None:
        """Counts what is in the queue, in its order."""
        u: list[float] = []
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, Row):
                self._take_row(item, u)
            elif 0.0 <= item[0] <= 1.0:
                u.append(item[0])
                self._since = Since(self._since.kept + 1, min(self._since.least, item[1]))
        self._seen.add(u)
        self._unsaved_steps += len(u)

    def _take_row(self, row: Row, u: list[float]) -> None:
        if row.usable:
            u.append(row.u)
            self._unsaved.append(Entry(row, self._since))
        else:
            self.refused += 1
        self._since = Since()

    def _save(self) -> bool:
        if self._damaged and not self._start_over():
            return False
        try:
            self._file.write(self._unsaved, self._seen, self._since, self._rows)
        except sqlite3.Error as error:
            if not self.errors:
                log.warning("the ledger cannot be written (%s): what is learned stays in RAM until it can", error)
            self._failed(error)
            return False
        self._unsaved.clear()
        self._unsaved_steps = 0
        return True

    def _failed(self, error: sqlite3.Error) -> None:
        self.errors += 1
        self._damaged = self._damaged or damaged(error)

    def _start_over(self) -> bool:
        try:
            self._file.start_over()
        except (StoreError, OSError, sqlite3.Error) as error:
            self.errors += 1
            log.error("no new ledger can be made: %s", error)
            return False
        self._damaged = False
        return True
