"""How much one key may ask."""

from __future__ import annotations

from collections.abc import Callable

from protocol.errors import SkerryError


class RateLimited(SkerryError):
    """`retry_after`: seconds until the next one is allowed."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many Asks per second for this key")
        self.retry_after = retry_after


class Bucket:
    """A token bucket of one second's worth. `rate` per second, 0: no limit; `clock` in seconds."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._left = max(1.0, rate)
        self._at = clock()

    def take(self) -> None:
        """Raises RateLimited."""
        if self._rate <= 0.0:
            return
        now = self._clock()
        self._left = min(max(1.0, self._rate), self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            raise RateLimited((1.0 - self._left) / self._rate)
        self._left -= 1.0
