"""Which updates an edge takes, and the name of the reason for each that it does not (REASONS)."""

from __future__ import annotations

import math
from collections.abc import Callable

from protocol.limits import Buckets
from protocol.rounds import Update

RATE = 1.0  # updates per second of one device
BURST = 64  # at once
MAX_EVIDENCE = 1e7  # rows of one update: more than a device can collect
MAX_STATISTIC = 1000.0
NOISE = (1e-3, 1e6)  # if there is any
_BUCKETS = 16_384

REASONS = {
    "malformed": "not a message of the protocol",
    "version": "of a newer version",
    "retained": "kept by the broker: an update is for one round",
    "flood": f"more than {RATE:g} a second, {BURST} at once",
    "out_of_range": "the threshold is not in 0 to 1",
    "evidence": f"the evidence is not above 0 and at most {MAX_EVIDENCE:g}",
    "statistics": f"statistics are not numbers of at most {MAX_STATISTIC:g}",
    "noise": f"clip is not a number of at least 0, or noise neither 0 nor {NOISE[0]:g} to {NOISE[1]:g}",
    "not_secure": "in the clear, while rounds are secure",
    "future": "of a round that was not called yet",
    "forgotten": "of a round so long ago that it may have counted already",
    "duplicate": "the same device, round and subject again",
    "superseded": "older than what the device has said since",
    "subjects": "more subjects at once than one device may have",
    "crowded": "more devices than an edge keeps",
    "implausible": "far from the others, and not what the device said before",
}


class Admission:
    """Judges what a message says by itself; `round_store` knows what else was said. Used under the rounds' lock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._senders = Buckets(RATE, BURST, clock, most=_BUCKETS)

    def floods(self, device: str) -> bool:
        return not self._senders.take(device)

    def judge(self, update: Update, round: int, floor: int) -> str | None:
        """The reason to refuse it in `round`, or None. `floor`: the last round whose updates are not known any more."""
        if not (0.0 <= update.clip < math.inf and (update.noise == 0.0 or NOISE[0] <= update.noise <= NOISE[1])):
            return "noise"  # before all others, whose noise goes into the epsilon ledger
        if not 0.0 <= update.threshold <= 1.0:  # also NaN
            return "out_of_range"
        if not 0.0 < update.evidence <= MAX_EVIDENCE:
            return "evidence"
        if not all(abs(value) <= MAX_STATISTIC for value in update.statistics or ()):
            return "statistics"
        if update.round > round:
            return "future"
        return "forgotten" if update.round <= floor else None
