"""How long an answer of peers is worth waiting for, and whether asking them is worth it at all."""

from __future__ import annotations

from collections.abc import Callable, Set

_USELESS = 8  # questions in a row that nobody could help with, after which fewer are asked
_RAREST = 1 / 64  # of the questions are asked all the same, to find out when that changes


class RoundTrip:
    """A deadline learned from round trips as RFC 6298 (section 2) learns a retransmission timeout: the smoothed time
    plus four times its deviation. Seconds; between `floor` and `cap`, and `cap` before the first measurement."""

    def __init__(self, floor: float, cap: float) -> None:
        self._floor = floor
        self._cap = cap
        self.smoothed = 0.0
        self.deviation = 0.0
        self.samples = 0

    @property
    def deadline(self) -> float:
        if not self.samples:
            return self._cap
        return min(self._cap, max(self._floor, self.smoothed + 4.0 * self.deviation))

    def observe(self, seconds: float) -> None:
        """Late ones too, or the deadline could never grow."""
        if self.samples:
            self.deviation += (abs(self.smoothed - seconds) - self.deviation) / 4
            self.smoothed += (seconds - self.smoothed) / 8
        else:
            self.smoothed, self.deviation = seconds, seconds / 2
        self.samples += 1


class Worth:
    """Whether to ask about one space. After 8 useless questions in a row the next is asked with probability 8 / 9, and
    so on down to 1 / 64; one that helps, or somebody new who has the space, makes it 1 again."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw
        self._useless = 0
        self._holders: Set[str] = frozenset()

    def asking(self, holders: Set[str]) -> bool:
        if not holders <= self._holders:
            self._useless = 0
        self._holders = holders
        return self._useless < _USELESS or self._draw() < max(_RAREST, _USELESS / (self._useless + 1))

    def outcome(self, *, helped: bool) -> None:
        self._useless = 0 if helped else self._useless + 1
