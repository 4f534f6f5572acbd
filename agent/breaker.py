"""Circuit breaker: stop asking somebody who does not answer, and find out by itself when they do again.

Nygard, "Release It!", 2007. closed → (failures in a row) → open → (a jittered while) → half-open: one trial question
→ closed, or open again for twice as long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Thread-safe. `limit` failures in a row open it, for `pause` seconds at first and at most `longest`; `jitter`
    gives numbers in [0, 1)."""

    def __init__(
        self,
        clock: Callable[[], float],
        jitter: Callable[[], float],
        limit: int = 3,
        pause: float = 1.0,
        longest: float = 30.0,
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._limit = limit
        self._first_pause = pause
        self._longest = longest
        self._lock = threading.Lock()
        self._failures = 0
        self._pause = pause
        self._retry_at: float | None = None  # None: closed
        self._trial = False
        self.opened = 0  # how often it opened

    @property
    def state(self) -> State:
        with self._lock:
            if self._retry_at is None:
                return "closed"
            return "half_open" if self._trial or self._clock() >= self._retry_at else "open"

    def allows(self) -> bool:
        """May a question be asked now? When half-open, the first caller gets the trial."""
        with self._lock:
            if self._retry_at is None:
                return True
            if self._trial or self._clock() < self._retry_at:
                return False
            self._trial = True
            return True

    def success(self) -> None:
        with self._lock:
            self._failures = 0
            self._pause = self._first_pause
            self._retry_at = None
            self._trial = False

    def failure(self) -> None:
        with self._lock:
            self._failures += 1
            if self._trial:
                self._pause = min(self._longest, self._pause * 2)
            elif self._retry_at is not None or self._failures < self._limit:
                return
            self._trial = False
            self._retry_at = self._clock() + self._pause * (0.5 + self._jitter())
            self.opened += 1

    def abandoned(self) -> None:
        """The trial's question was dropped before anybody could answer: the next caller may try."""
        with self._lock:
            self._trial = False
