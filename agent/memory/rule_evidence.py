"""What a device has seen of memory being right or wrong, and the thresholds theta that follow from it.

Labels cost nothing: an escalation that went to the cloud although memory had a candidate tells whether the candidate
was right, and audits tell it of a share of the hits. theta is the least score from which on the labels' rate of wrong
reuse has an upper confidence bound below the accepted one, as in vCache (arXiv 2502.03771).

Misses always leave a label, hits only if they are audited, so among the labels low scores are too many. For theta that
is on the safe side as long as higher scores are wrong less often. The rate that is reported is not left to that: it is
of hits alone, each audited one standing for 1 / its propensity of them (Horvitz and Thompson, 1952).
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from protocol.errors import ProtocolError

BOUND = 0.15  # accepted rate of wrong reuse
START = 0.5  # theta before there is evidence: on recorded steps 1 to 7 % of the hits above it are wrong
WINDOW = 1024  # labels; older ones are forgotten, since memory and its users change
_GROUP = 8  # labels by which a threshold is lowered at a time
_Z = 1.6449  # one-sided 95 %
_VERSION = 1

_Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class Label(msgspec.Struct, frozen=True, array_like=True):
    """`agree`: the candidate was the draft. `hit`: it would have been used, had it not been audited. `origin`: whose
    entry spoke for it most."""

    score: _Share
    memory_right: bool
    draft_right: bool
    agree: bool
    hit: bool
    propensity: Annotated[float, Meta(gt=0.0, le=1.0)]
    origin: bytes = b""


class _Saved(msgspec.Struct, array_like=True):
    version: int
    labels: list[Label]


class Evidence:
    """Of one space. `bound`: the accepted rate of wrong reuse."""

    def __init__(self, bound: float = BOUND) -> None:
        self.bound = bound
        self._labels: list[Label] = []
        self._thetas = {True: START, False: START}
        self._gains = True

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
        self._labels.append(Label(score, memory_right, draft_right, agree, hit, propensity, origin))
        del self._labels[:-WINDOW]
        self._learn(agree)

    def forget(self, origin: bytes) -> None:
        """What was learned from this origin's entries says nothing of the others'."""
        self._labels = [label for label in self._labels if label.origin != origin]
        for agree in (True, False):
            self._learn(agree)

    @property
    def wrong_reuse_rate(self) -> tuple[float, float]:
        """Share of wrong ones among the hits, from the audits, and its upper confidence bound; (0, 1) without
        audits."""
        hits = [(1.0 / label.propensity, label.memory_right) for label in self._labels if label.hit]
        total = sum(weight for weight, _ in hits)
        if not total:
            return 0.0, 1.0
        rate = sum(weight for weight, right in hits if not right) / total
        effective = total**2 / sum(weight**2 for weight, _ in hits)  # Kish, 1965
        return rate, upper_bound(rate, effective)

    def _learn(self, agree: bool) -> None:
        labels = sorted((label for label in self._labels if label.agree == agree), key=lambda label: -label.score)
        self._thetas[agree] = theta = _least_safe(labels, self.bound)
        if not agree:
            above = [label for label in labels if label.score >= theta]
            gained = sum(label.memory_right - label.draft_right for label in above)
            self._gains = gained >= 0

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(_Saved(_VERSION, self._labels))

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
        evidence._labels = saved.labels[-WINDOW:]
        for agree in (True, False):
            evidence._learn(agree)
        return evidence


def _least_safe(labels: list[Label], bound: float) -> float:
    """theta from labels in falling order of score. START as long as nothing is proven; if the labels above it speak
    against it, higher than any score at which memory was wrong."""
    wrong = np.cumsum([not label.memory_right for label in labels])
    for count in range(len(labels) - len(labels) % _GROUP, 0, -_GROUP):
        if upper_bound(wrong[count - 1] / count, count) <= bound:
            return labels[count - 1].score
    above = [label for label in labels if label.score >= START]
    errors = [label.score for label in above if not label.memory_right]
    if errors and len(errors) > bound * len(above) + 1:
        return math.nextafter(max(errors), 2.0)
    return START


def upper_bound(rate: float, n: float) -> float:
    """The one-sided 95 % upper bound of a rate seen in n labels (Wilson, 1927)."""
    middle = rate + _Z**2 / (2 * n)
    spread = _Z * math.sqrt(max(0.0, rate * (1 - rate) / n + _Z**2 / (4 * n**2)))
    return min(1.0, (middle + spread) / (1 + _Z**2 / n))
