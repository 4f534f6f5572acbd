"""What a detector finds: stretches of text that say something of a person, or that give somebody access."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum


class Kind(StrEnum):
    """The value names the placeholder: `[EMAIL_1]`."""

    EMAIL = "EMAIL"
    PHONE = "PHONE"
    CARD = "CARD"
    IBAN = "IBAN"
    ID = "ID"
    IP = "IP"
    MAC = "MAC"
    URL = "URL"
    SECRET = "SECRET"
    BIRTH = "DATE"
    NAME = "NAME"
    ADDRESS = "ADDRESS"


@dataclass(frozen=True, slots=True)
class Span:
    """`text[start:end]`. `confidence`: a rank of the rule that found it, no probability: 0.9 a check digit or a format
    that hardly anything else has, 0.7 a cue before it, 0.5 a list of names or the shape alone."""

    start: int
    end: int
    kind: Kind
    confidence: float

    def moved(self, by: int) -> Span:
        return replace(self, start=self.start + by, end=self.end + by)


def united(found: Iterable[Span]) -> list[Span]:
    """In order and apart. What overlaps becomes one span of the kind that was surest, so that no end of it is left."""
    whole: list[Span] = []
    for span in sorted(found, key=lambda span: (span.start, -span.end)):
        if whole and span.start < whole[-1].end:
            last = whole[-1]
            surest = max(last, span, key=lambda one: (one.confidence, one.end - one.start))
            whole[-1] = replace(surest, start=last.start, end=max(last.end, span.end))
        else:
            whole.append(span)
    return whole
