"""How much one key may ask."""

from __future__ import annotations

from collections.abc import Callable

from protocol.errors import SkerryError
from protocol.limits import Bucket


class RateLimited(SkerryError):
    """`retry_after`: seconds until the next one is allowed."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many Asks per second for this key")
        self.retry_after = retry_after


class Allowance:
    """One second's worth at once. `rate` per second, 0: no limit; `clock` in seconds."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._bucket = Bucket(rate, max(1.0, rate), clock) if rate > 0.0 else None

    def take(self) -> None:
        """Raises RateLimited."""
        if self._bucket is not None and not self._bucket.take():
            raise RateLimited(self._bucket.seconds_until(1.0))
