"""How much somebody may send."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Bucket:
    """A token bucket: `rate` per second, at most `burst` at once. `clock` in seconds. Not thread-safe."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at = clock()

    def take(self, amount: float = 1.0) -> bool:
        """False: not now, and nothing was taken."""
        if self.seconds_until(amount) > 0.0:
            return False
        self._left -= amount
        return True

    def seconds_until(self, amount: float) -> float:
        """Until so much is there; infinite if it is more than ever fits in."""
        now = self._clock()
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._rate)
        self._at = now
        if amount <= self._left:
            return 0.0
        return (amount - self._left) / self._rate if amount <= self._burst and self._rate > 0.0 else float("inf")


class Buckets:
    """One bucket for each name, of which the `most` that were used last are remembered."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float], most: int = 1024) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._most = most
        self._buckets: OrderedDict[str | bytes, Bucket] = OrderedDict()

    def take(self, name: str | bytes, amount: float = 1.0) -> bool:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(self._rate, self._burst, self._clock)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return bucket.take(amount)
