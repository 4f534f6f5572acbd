"""How often replies agree with the drafts they were asked about, and what follows for asking ahead."""

from __future__ import annotations

import math

_WORTH = 0.25  # a question behind others is asked if it is of use with at least this probability
_MEMORY = 32  # replies that the estimate looks back on


class Agreement:
    """An exponentially weighted share. Starts undecided, at one half."""

    def __init__(self) -> None:
        self.rate = 0.5

    def observe(self, *, agreed: bool) -> None:
        self.rate += (agreed - self.rate) / _MEMORY

    def worth_asking(self, limit: int) -> int:
        """How many questions of one answer may be open at once, from 1 to `limit`.

        One behind k open ones counts only if all k replies agree, with probability rate ** k.
        """
        if self.rate >= 1.0 - 1e-9:
            return limit
        behind = int(math.log(_WORTH) / math.log(max(self.rate, 1e-9)))
        return min(limit, 1 + behind)
