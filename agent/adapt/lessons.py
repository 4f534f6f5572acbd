"""What the device has to learn from: lessons on its disk, bounded by bytes and by age, and forgotten for good.

If the disk refuses, lessons stay in RAM within a bound until it takes them. Age is running time (`MemoryClock`), so
that a clock that jumps makes nothing old.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from agent.adapt.lesson import Lesson, Source, check, decode, encode
from agent.adapt.lessons_store import Group, LessonsFile, Row
from agent.config import AgentConfig, device_folder
from agent.memory.memory_state import MemoryClock
from agent.memory.store import damaged
from protocol.errors import StoreError, TrainingError

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BYTES = 64 * 10**6
MAX_AGE = 90 * 86_400.0  # seconds
TAKEN = 10_000  # lessons
TAKEN_BYTES = 4 << 20  # of lessons as they are stored; as Python's objects they take some ten times that
_UNSAVED_BYTES = 4 << 20  # in RAM while the disk refuses


@dataclass(frozen=True, slots=True)
class Stats:
    """Of the lessons for this model. `bytes` as they are stored, `oldest` in seconds of running time, `others`:
    lessons for other models, `unsaved`: in RAM, because the disk refuses, `lost`: for which RAM had no room either."""

    count: int = 0
    private: int = 0
    bytes: int = 0
    oldest: float = 0.0
    revision: int = 0
    others: int = 0
    unsaved: int = 0
    lost: int = 0
    sources: dict[str, int] = field(default_factory=dict)


def lessons_of(config: AgentConfig, model: str) -> Lessons:
    """The device's own. Raises StoreError."""
    adapt = config.adapt
    return Lessons(device_folder(config) / "lessons", model, adapt.megabytes * 10**6, adapt.days * 86_400.0)


class Lessons:
    """May be used by several threads, each of which then waits for the disk, and by several processes.

    `model`: fingerprint of the model's file: lessons of another model are kept until they are too old, and not taken.
    `max_age`: seconds of running time. Raises StoreError if the file can't be opened.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        max_bytes: int = MAX_BYTES,
        max_age: float = MAX_AGE,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.errors = self.lost = 0
        self._model = model
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._file = LessonsFile(folder, max_bytes)
        try:
            self._state = self._file.state()  # as it was last seen
        except sqlite3.Error as error:
            self._file.close()
            raise StoreError(f"the lessons cannot be read: {error}") from None
        self._clock = MemoryClock(clock, wall, self._state.seconds, self._state.wall)
        self._lock = threading.Lock()  # of the file, and of what follows
        self._unsaved: deque[Row] = deque()
        self._closed = False

    def add(self, lesson: Lesson, answer: str = "") -> int:
        """The revision with it. It replaces what was learned of the same `answer`. Raises TrainingError if the lesson
        makes no sense, and nothing if the disk refuses it."""
        check(lesson)
        with self._lock:
            self._unsaved = deque(row for row in self._unsaved if not answer or row.answer != answer)
            self._unsaved.append(self._row(lesson, answer))
            self._save()
            return self._state.revision + len(self._unsaved)

    def add_all(self, lessons: Iterable[Lesson]) -> int:
        """All of them, durably, or none. How many. Raises what the iteration raises, TrainingError, StoreError."""
        rows, size = [], 0
        for lesson in lessons:
            check(lesson)
            rows.append(self._row(lesson, ""))
            size += len(rows[-1].lesson)
            if size > self._max_bytes:
                raise StoreError(
                    f"these lessons alone take more than {self._max_bytes:,} bytes: raise adapt.megabytes, or add fewer"
                )
        with self._lock:
            self._write(rows)
        return len(rows)

    def take(self, private: bool, most: int = TAKEN, most_bytes: int = TAKEN_BYTES) -> list[Lesson]:
        """Newest first, as many as the bounds allow. `private`: with the private ones. Raises StoreError."""
        with self._lock:
            if self._unsaved:
                self._save()
            raw = [row.lesson for row in reversed(self._unsaved) if private or not row.private]
            raw += self._ask(lambda file: file.newest(self._model, private, most, most_bytes))
        lessons = [lesson for one in raw[:most] for lesson in _decoded(one)]
        return lessons if private else [lesson for lesson in lessons if not lesson.private]

    @property
    def revision(self) -> int:
        """Grows by one with each lesson that is added, by whichever process. Raises StoreError."""
        with self._lock:
            return self._revision()

    @property
    def count(self) -> int:
        """Of lessons for this model, private ones included. Raises StoreError."""
        return self.stats().count

    def stats(self) -> Stats:
        """Raises StoreError."""
        with self._lock:
            if self._unsaved:
                self._save()
            groups, unsaved = self._ask(LessonsFile.groups), list(self._unsaved)
            revision, lost, now = self._revision(), self.lost, self._clock.now()
        groups += [Group(row.private, row.model, row.source, 1, len(row.lesson), row.at) for row in unsaved]
        ours = [group for group in groups if group.model == self._model]
        return Stats(
            count=sum(group.count for group in ours),
            private=sum(group.count for group in ours if group.private),
            bytes=sum(group.bytes for group in ours),
            oldest=max((now - group.oldest for group in ours), default=0.0),
            revision=revision,
            others=sum(group.count for group in groups if group.model != self._model),
            unsaved=len(unsaved),
            lost=lost,
            sources={
                source: sum(group.count for group in ours if group.source == source)
                for source in sorted({group.source for group in ours})
            },
        )

    @property
    def waiting(self) -> int:
        """Lessons in RAM that the disk has not taken yet."""
        return len(self._unsaved)

    def drop(self, answer: str) -> int:
        """How many lessons of this answer went, durably. Raises StoreError."""
        with self._lock:
            kept = deque(row for row in self._unsaved if not answer or row.answer != answer)
            gone, self._unsaved = len(self._unsaved) - len(kept), kept
            return gone + self._ask(lambda file: file.drop(answer))

    def forget(self, source: Source | None = None, private: bool = False, before: float | None = None) -> int:
        """How many lessons went, of whatever model: all to which everything that is given applies. `private`: only
        private ones; `before`: seconds of running time that they are older than. Nothing of them is on the disk when
        this returns; lessons that wait in RAM for the disk go too. Raises StoreError."""
        with self._lock:
            gone = len(self._unsaved)
            self._unsaved.clear()
            limit = None if before is None else self._clock.now() - before
            gone += self._ask(lambda file: file.forget(source, private, limit))
            try:
                self._file.scrub()
            except (sqlite3.Error, OSError) as error:
                raise StoreError(
                    f"{gone} lessons are forgotten, but what they left on the disk could not be overwritten ({error}): "
                    "free some space, and forget again"
                ) from None
            return gone

    def tend(self) -> bool:
        """Writes what waits in RAM, drops what is too old and notes the time. To be called now and then. Did the disk
        take it?"""
        with self._lock:
            return self._save()

    def close(self) -> None:
        """Writes what is in RAM, if the disk takes it. Idempotent."""
        with self._lock:
            if not self._closed:
                self._save()
                self._closed = True
                self._file.close()

    def _row(self, lesson: Lesson, answer: str) -> Row:
        return Row(lesson.private, self._model, lesson.source, answer, self._clock.now(), encode([lesson]))

    # From here on: with the lock.

    def _revision(self) -> int:
        self._state = self._ask(LessonsFile.state)
        return self._state.revision + len(self._unsaved)

    def _save(self) -> bool:
        try:
            self._write()
        except StoreError as error:
            if self.errors == 1:
                log.warning("%s; lessons stay in RAM until it can", error)
            self._bound()
            return False
        self._unsaved.clear()
        return True

    def _write(self, rows: Sequence[Row] | None = None) -> None:
        """These, or what waits in RAM. Raises StoreError; then nothing was written."""
        now = self._clock.now()

        def write(file: LessonsFile) -> None:
            self._state = file.state()
            file.write(self._unsaved if rows is None else rows, now, self._clock.wall(), now - self._max_age)
            self._state = file.state()

        self._ask(write)

    def _bound(self) -> None:
        """Marks what waits, so that what is forgotten meanwhile is not written later, and lets the oldest go."""
        self._unsaved = deque(
            row if row.erased is not None else replace(row, erased=self._state.erased) for row in self._unsaved
        )
        while sum(len(row.lesson) for row in self._unsaved) > _UNSAVED_BYTES:
            self._unsaved.popleft()
            self.lost += 1

    def _ask(self, use: Callable[[LessonsFile], T]) -> T:
        """Of the file, and of an empty one in its place if it is damaged. Raises StoreError."""
        if self._closed:
            raise StoreError("the lessons are closed: the agent is shutting down")
        try:
            if not self._file.broken:
                return use(self._file)
        except sqlite3.Error as error:
            self.errors += 1
            if not damaged(error):
                raise StoreError(f"the lessons cannot be used: {error}; free some space, or check the disk") from None
        try:
            self._file.start_over()
            self._unsaved = deque(replace(row, erased=None) for row in self._unsaved)
            return use(self._file)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the lessons are damaged, and no new file can be made: {error}; check the disk") from None


def _decoded(raw: bytes) -> list[Lesson]:
    try:
        return decode(raw)
    except TrainingError as error:
        log.error("a lesson is passed over: %s", error)
        return []
