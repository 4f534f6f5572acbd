"""How far each origin is believed: audits, a running test for too many wrong reuses, and quarantine.

An audit is a memory hit that the cloud was asked about as well. It says of each origin whose entry spoke for the hit
whether that was right. The test is Page's CUSUM (Biometrika 41, 1954) on the audits of one origin, of the bound b on
its wrong-reuse rate against the rate q = 2 b:

    S <- max(0, S + ln(q / b))               after a wrong one
    S <- max(0, S + ln((1 - q) / (1 - b)))   after a right one;   S >= h: quarantine

- **Bound.** S is never negative, so whatever an origin did before, `audits_to_quarantine` = ceil(h / ln(q / b)) wrong
  audits in a row quarantine it. While S > 0 each of its hits is audited, and so is a newcomer's first one. So an
  origin that is always wrong gets no further than that many hits, all of them audited; one that turns bad after a
  long time of being right is first caught after 1 / base hits on average, and then as fast.
- **False alarms.** An origin whose wrong-reuse rate is at most b is quarantined only after exp(h) = 1,000 audits or
  more on average (Lorden, Ann. Math. Stat. 42, 1971), and with half that rate practically never. S grows on average
  from a rate of about 1.4 b on: whatever is worse is caught, and the worse the sooner.

A confidence bound on the rate (Clopper and Pearson) would have to be looked at after each audit, which voids its
confidence, and it takes the longer to turn the better an origin's past was.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_KEEP = 1.0 - 1.0 / 256  # of the measured rate's past at each audit
_FALSE_ALARMS = 1000.0  # exp(h)


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one origin. `right`, `wrong`: audits, exponentially forgotten. `suspicion`: S."""

    right: float = 0.0
    wrong: float = 0.0
    suspicion: float = 0.0
    quarantined: bool = False

    @property
    def wrong_rate(self) -> float:
        """The measured wrong-reuse rate; 0 before the first audit."""
        audits = self.right + self.wrong
        return self.wrong / audits if audits else 0.0


class Record(Protocol):
    """What is kept of one origin."""

    @property
    def origin(self) -> bytes: ...

    @property
    def audits(self) -> float: ...

    @property
    def wrong(self) -> float: ...

    @property
    def quarantined(self) -> bool: ...


class Records(Protocol):
    """Where that is kept, beside the entries (`agent.memory.memory`). Nothing of it waits for the disk."""

    def origins(self) -> Sequence[Record]: ...

    def note_audit(self, origin: bytes, wrong: bool, keep: float) -> None:
        """One more audit; of those before, `keep` still counts."""
        ...

    def forget_origin(self, origin: bytes) -> None:
        """Its entries are found no more, for good."""
        ...


class Trust:
    """Thread-safe. `own`: this device's public key. `bound`: b, in (0, 1). `base`: share of hits that is audited at
    least. `records`: where the outcomes are kept; after a restart S is the sum of what they count, at least 0.

    The device's own entries are an origin like any other, but are audited at the base rate from the start and never
    quarantined: whether its own reuse is good enough is for the hit rule's threshold. The operator lifts a quarantine
    with `skerry memory clear --origin`.
    """

    def __init__(self, own: bytes, *, bound: float, base: float, records: Records | None = None) -> None:
        q = min(2.0 * bound, (1.0 + bound) / 2.0)
        self._wrong_step = math.log(q / bound)
        self._right_step = math.log((1.0 - q) / (1.0 - bound))
        self._limit = math.log(_FALSE_ALARMS)
        self.audits_to_quarantine = math.ceil(self._limit / self._wrong_step)
        self._own = own
        self._base = base
        self._records = records
        self._lock = threading.Lock()
        self._standings = {record.origin: self._recalled(record) for record in (records.origins() if records else ())}

    def _recalled(self, record: Record) -> Standing:
        right = record.audits - record.wrong
        suspicion = max(0.0, record.wrong * self._wrong_step + right * self._right_step)
        return Standing(right, record.wrong, min(suspicion, self._limit - self._wrong_step), record.quarantined)

    def standing(self, origin: bytes) -> Standing:
        return self._standings.get(origin, Standing())

    def standings(self) -> dict[bytes, Standing]:
        """Of all origins that were ever audited."""
        with self._lock:
            return dict(self._standings)

    def quarantined(self, origin: bytes) -> bool:
        return self.standing(origin).quarantined

    def audit_rate(self, origins: Sequence[bytes]) -> float:
        """The probability with which a hit that these origins speak for is to be audited."""
        return max((self._rate(origin) for origin in origins), default=self._base)

    def _rate(self, origin: bytes) -> float:
        standing = self.standing(origin)
        if origin == self._own:
            return self._base
        return 1.0 if standing.suspicion > 0.0 else max(self._base, 1.0 / (1.0 + standing.right))

    def note(self, origin: bytes, *, wrong: bool) -> bool:
        """The outcome of an audit. True: this quarantined the origin, and its entries went."""
        with self._lock:
            before = self.standing(origin)
            if before.quarantined:
                return False
            suspicion = max(0.0, before.suspicion + (self._wrong_step if wrong else self._right_step))
            after = Standing(
                right=before.right * _KEEP + (not wrong),
                wrong=before.wrong * _KEEP + wrong,
                suspicion=suspicion,
                quarantined=suspicion >= self._limit - 1e-9 and origin != self._own,
            )
            self._standings[origin] = after
        if self._records is not None:
            self._records.note_audit(origin, wrong, _KEEP)
            if after.quarantined:
                self._records.forget_origin(origin)
        return after.quarantined
