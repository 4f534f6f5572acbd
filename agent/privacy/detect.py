"""The detector: all rules over one text, and what may become personal at its end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from agent.privacy import addresses, marks, names
from agent.privacy.numbers import Numbers
from agent.privacy.span import Span, united

FEW = 5  # digits at the end of a text that may yet become a number of somebody's: a year has four

_CHUNKS = re.compile(r"\S+")
_AT = re.compile(r"[\w.+'%-]+@[\w.-]*$")
_URL_END = re.compile(r"\b[a-z][a-z0-9+.-]{1,12}://\S*$", re.IGNORECASE)
_KEY_END = re.compile(
    r"(?:\b(?:AKIA|ASIA|gh[pousr]_|github_pat_|xox[abprs]-|AIza|sk[-_]|glpat-|hf_|eyJ)|-----BEGIN )[^\n]*$"
)
_SECRET_END = re.compile(marks.SECRET_CUE + r"[\"'`]?\S*$", re.IGNORECASE)
_REACH = 160  # characters at the end in which something may be half written


class Detector:
    """Made once, used by any thread. `regions`: countries whose phone numbers are known without +."""

    def __init__(self, regions: Sequence[str] = ("GB", "US")) -> None:
        self._numbers = Numbers(regions)

    def spans(self, text: str) -> list[Span]:
        """What was found, in order, none overlapping another."""
        return united([*marks.find(text), *self._numbers.find(text), *names.find(text), *addresses.find(text)])

    def unsettled(self, text: str, few: int = FEW) -> int | None:
        """Where that begins at the end of `text` which may become personal as the text goes on; None if nothing may. A
        cue whose value is still to come counts. `few`: digits from which on a number may be somebody's."""
        offset = max(0, len(text) - _REACH)
        end = text[offset:]
        begins = [begin for begin in (names.may_begin(end), _digits_begin(end, few)) if begin is not None]
        begins += [match.start() for pattern in (_AT, _URL_END, _KEY_END) if (match := pattern.search(end))]
        if (match := _SECRET_END.search(end)) is not None:
            begins.append(match.end("link"))
        return offset + min(begins) if begins else None


def _digits_begin(end: str, few: int) -> int | None:
    """Where the chunks at the end that hold digits begin: a number that is being written digit by digit."""
    begin, digits = len(end), 0
    for chunk in reversed(list(_CHUNKS.finditer(end))):
        count = sum(map(str.isdigit, chunk[0]))
        if (not count and any(map(str.isalpha, chunk[0]))) or "\n" in end[chunk.end() : begin]:
            break
        digits += count
        begin = chunk.start()
    return begin if digits >= few else None
