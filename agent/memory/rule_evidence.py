"""What a device has seen of memory being right or wrong, and the thresholds theta that follow from it.

Labels cost little: an escalation that went to the cloud although memory had a candidate tells whether the candidate
was right, and audits tell it of a share of the hits, at first of all. theta is the least score from which on the
labels' rate of wrong reuse has an upper confidence bound below the accepted one, as in vCache (arXiv 2502.03771).

Misses always leave a label, hits only if they are audited, so among the labels low scores are too many. For theta that
is on the safe side as long as higher scores are wrong less often. The rate that is reported is not left to that: it is
of hits alone, each audited one standing for 1 / its propensity of them (Horvitz and Thompson, 1952).
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from protocol.errors import ProtocolError

BOUND = 0.1  # accepted rate of wrong reuse
START = 0.5  # theta before there is evidence: the score above which that rate was just held on recorded steps
WINDOW = 1024  # labels; older ones are forgotten, since memory and its users change
_GROUP = 8  # labels by which a threshold is lowered at a time
_PROVEN = 1.6449  # one-sided 95 %
_LIKELY = 0.8416  # one-sided 80 %
_VERSION = 2

_Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class Label(msgspec.Struct, frozen=True, array_like=True):
    """`agree`: the candidate was the draft. `hit`: it would have been used, had it not been audited. `origin`: who made
    its best supporter."""

    score: _Share
    memory_right: bool
    draft_right: bool
    agree: bool
    hit: bool
    propensity: Annotated[float, Meta(gt=0.0, le=1.0)]
    origin: bytes


class _Saved(msgspec.Struct, array_like=True):
    version: int
    labels: list[Label]


class Evidence:
    """Of one space. `bound`: the accepted rate of wrong reuse."""

    def __init__(self, bound: float = BOUND) -> None:
        self.bound = bound
        self._restart(())

    def _restart(self, labels: tuple[Label, ...]) -> None:
        self._labels: deque[Label] = deque()
        self._ranked: dict[bool, list[Label]] = {True: [], False: []}  # by falling score; the key is `agree`
        self._audits = 0
        self._thetas = {True: START, False: START}
        self._gains = True
        for label in labels[-WINDOW:]:
            self._add(label)
        for agree in (True, False):
            self._learn(agree)

    @property
    def theta(self) -> float:
        """No candidate below it is a hit, and so none of a lower similarity."""
        return min(self._thetas.values())

    def allows(self, score: float, *, agree: bool) -> bool:
        """May a candidate of this score be used? Where it is not the draft, memory must also have been right no less
        often than the draft."""
        return score >= self._thetas[agree] and (agree or self._gains)

    def note(
        self,
        score: float,
        *,
        memory_right: bool,
        draft_right: bool,
        agree: bool,
        propensity: float = 1.0,
        origin: bytes = b"",
    ) -> None:
        """A candidate whose step the cloud has answered. `propensity`: with what probability it was going to be asked:
        1 for a candidate that was no hit, the audits' rate for a hit."""
        score = min(1.0, max(0.0, score))
        hit = self.allows(score, agree=agree)
        self._add(Label(score, memory_right, draft_right, agree, hit, propensity, origin))
        self._learn(agree)

    def forget(self, origin: bytes) -> None:
        """What was learned from this origin's entries says nothing of the others'."""
        self._restart(tuple(label for label in self._labels if label.origin != origin))

    @property
    def audit_rate(self) -> float:
        """The share of hits that should be audited for theta's sake: all at first, 1 / sqrt(1 + n) after n audits."""
        return 1.0 / math.sqrt(1 + self._audits)

    @property
    def wrong_reuse_rate(self) -> tuple[float, float]:
        """Share of wrong ones among the hits, from the audits, and its upper confidence bound; (0, 1) without
        audits."""
        labels = list(self._labels)  # at once: the engine's thread may add to them while metrics are read
        hits = [(1.0 / label.propensity, label.memory_right) for label in labels if label.hit]
        total = sum(weight for weight, _ in hits)
        if not total:
            return 0.0, 1.0
        rate = sum(weight for weight, right in hits if not right) / total
        effective = total**2 / sum(weight**2 for weight, _ in hits)  # Kish, 1965
        return rate, float(upper_bounds(np.array([rate]), np.array([effective]), _PROVEN)[0])

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(_Saved(_VERSION, list(self._labels)))

    @classmethod
    def from_bytes(cls, raw: bytes, bound: float = BOUND) -> Evidence:
        """Raises ProtocolError if `raw` is not what `to_bytes` gave."""
        try:
            saved = msgspec.msgpack.decode(raw, type=_Saved)
        except msgspec.DecodeError as error:
            raise ProtocolError(
                f"what was kept of memory's hits cannot be read ({error}); it is learned anew"
            ) from None
        if saved.version != _VERSION:
            raise ProtocolError(f"what was kept of memory's hits has version {saved.version}; it is learned anew")
        evidence = cls(bound)
        evidence._restart(tuple(saved.labels))
        return evidence

    def _add(self, label: Label) -> None:
        self._labels.append(label)
        self._audits += label.hit
        insort(self._ranked[label.agree], label, key=_falling)
        if len(self._labels) > WINDOW:
            oldest = self._labels.popleft()
            self._audits -= oldest.hit
            self._ranked[oldest.agree].remove(oldest)

    def _learn(self, agree: bool) -> None:
        labels = self._ranked[agree]
        self._thetas[agree] = theta = _least_safe(labels, self.bound)
        if not agree:
            above = labels[: bisect_right(labels, -theta, key=_falling)]
            self._gains = sum(label.memory_right - label.draft_right for label in above) >= 0


def _least_safe(labels: list[Label], bound: float) -> float:
    """theta from labels in falling order of score: as low as is proven; START as long as nothing is; if the rate
    above START is over the bound as it stands, so high that it is likely to hold. Should that be higher than all
    scores, candidates are no hits and leave labels without audits, so it does not stay so for long."""
    wrong = np.cumsum([not label.memory_right for label in labels])
    counts = np.arange(1, len(labels) + 1)
    groups = counts[_GROUP - 1 :: _GROUP]
    proven = groups[upper_bounds(wrong[groups - 1] / groups, groups, _PROVEN) <= bound]
    if len(proven) and labels[int(proven[-1]) - 1].score < START:
        return labels[int(proven[-1]) - 1].score
    above = bisect_right(labels, -START, key=_falling)
    if not above or wrong[above - 1] <= bound * above + 1:  # a single error refutes nothing
        return START
    counts = counts[:above]
    held = np.flatnonzero(upper_bounds(wrong[:above] / counts, counts, _LIKELY) <= bound)
    return math.nextafter(labels[int(held[-1]) + 1 if len(held) else 0].score, 2.0)


def _falling(label: Label) -> float:
    return -label.score


def upper_bounds(rates: NDArray[np.float64], n: NDArray[Any], z: float) -> NDArray[np.float64]:
    """(k,) One-sided upper confidence bounds, z standard deviations up, of rates seen in n labels each (Wilson,
    1927)."""
    middle = rates + z**2 / (2 * n)
    spread = z * np.sqrt(rates * (1 - rates) / n + z**2 / (4 * n**2))
    bounds: NDArray[np.float64] = np.minimum(1.0, (middle + spread) / (1 + z**2 / n))
    return bounds
