"""A download's progress on a stream: one line redrawn on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

_WIDTH = 24  # characters of the bar
_REDRAW_S = 0.1


class ProgressBar:
    """Callable as `models.pull.Progress`. `clock` gives seconds (monotonic)."""

    def __init__(self, label: str, stream: TextIO, clock: Callable[[], float]) -> None:
        self._label = label
        self._stream = stream
        self._clock = clock
        self._terminal = stream.isatty()
        self._source = ""
        self._drawn_at = float("-inf")
        self._tenth = -1
        self._open_line = False

    def __call__(self, source: str, done: int, total: int) -> None:
        now = self._clock()
        if source != self._source:
            self.close()
            self._stream.write(f"{self._label}: from {source}\n")
            self._source, self._started, self._first = source, now, done
        self._draw(done, total, now) if self._terminal else self._line(done, total, now)

    def close(self) -> None:
        """Ends the line that is being redrawn."""
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False

    def _draw(self, done: int, total: int, now: float) -> None:
        if done < total and now - self._drawn_at < _REDRAW_S:
            return
        self._drawn_at = now
        self._open_line = True
        full = _WIDTH * done // total
        self._stream.write(f"\r[{'#' * full}{'.' * (_WIDTH - full)}] {self._numbers(done, total, now)}\x1b[K")
        self._stream.flush()

    def _line(self, done: int, total: int, now: float) -> None:
        tenth = 10 * done // total
        if tenth != self._tenth:
            self._tenth = tenth
            self._stream.write(f"{self._label}: {self._numbers(done, total, now)}\n")

    def _numbers(self, done: int, total: int, now: float) -> str:
        text = f"{100 * done // total:3d} %  {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
        seconds = now - self._started
        rate = (done - self._first) / seconds if seconds > 0 else 0.0  # what was resumed was not fetched now
        if rate <= 0:
            return text
        left = int((total - done) / rate)
        return f"{text}  {rate / 1e6:,.1f} MB/s  {left // 60}:{left % 60:02d} left"
