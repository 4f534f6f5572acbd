"""What was found in one request, what stands for it outside, and the way back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agent.privacy.span import Kind, Span, united

_WORDY = (Kind.NAME, Kind.ADDRESS)  # found as whole words only: "Ann" is no part of "annual"
_DIGITS_RUN = re.compile(r"\d(?:[ \t\u00a0.,:/()\u2010-\u2013-]{0,3}\d)+")
_GRAM = 5  # characters in a row that give a value away
_LONGEST = 200  # characters of a value that are looked for at the end of a text


@dataclass(frozen=True, slots=True)
class _Alias:
    """A way of writing a value. `text` is in lower case but for a part of a name, whose case counts: Will is not
    will."""

    text: str
    kind: Kind
    cased: bool = False


class Redaction:
    """The values of one request. `taken`: texts of the request, whose own words no placeholder may be."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self.values: dict[str, str] = {}  # by placeholder: as it was written first
        self._taken = "\n".join(taken)
        self._placeholders: dict[tuple[Kind, str], str] = {}  # by value
        self._aliases: dict[_Alias, str] = {}
        self._grams: dict[str, str] = {}  # runs of digits of the numbers among the values

    def add(self, written: str, kind: Kind) -> str:
        """The placeholder of a value: the same for the same value."""
        same = (kind, _normal(written))
        if same not in self._placeholders:
            number = 1 + sum(kind is known for known, _ in self._placeholders)
            while (placeholder := f"[{kind.value}_{number}]") in self._taken or placeholder in self.values:
                number += 1
            self._placeholders[same] = placeholder
            self.values[placeholder] = written
            for alias in _aliases(written, kind):
                self._aliases.setdefault(alias, placeholder)
            digits = _digits(written)
            for start in range(len(digits) - _GRAM + 1 if len(digits) >= _GRAM else 0):
                self._grams.setdefault(digits[start : start + _GRAM], placeholder)
        return self._placeholders[same]

    def known(self, text: str) -> list[tuple[Span, str]]:
        """Where one of the values, or a beginning of it that gives it away, stands in `text`, and its placeholder."""
        found = []
        low = _lower(text)
        for alias, placeholder in self._aliases.items():
            for start, end in _occurrences(text if alias.cased else low, alias):
                found.append((Span(start, end, alias.kind, 0.9), placeholder))
        if self._grams:
            for run in _DIGITS_RUN.finditer(text):
                digits = _digits(run[0])
                grams = (digits[at : at + _GRAM] for at in range(len(digits) - _GRAM + 1))
                hit = next((self._grams[gram] for gram in grams if gram in self._grams), None)
                if hit is not None:
                    found.append((Span(run.start(), run.end(), Kind.ID, 0.9), hit))
        return found

    def beginning(self, text: str) -> int | None:
        """Where a value begins that `text` ends in the middle of, or just behind; None if there is none."""
        offset = max(0, len(text) - _LONGEST)
        end = text[offset:]
        low = re.sub(r"\s", " ", _lower(end))
        best: int | None = None
        for alias in self._aliases:
            whole = re.sub(r"\s", " ", alias.text.lower())
            for length in range(min(len(whole), len(low)), 0, -1):
                at = len(low) - length
                if low.endswith(whole[:length]) and (length >= 3 or not _inside_word(low, at)):
                    best = at if best is None else min(best, at)
                    break
        return None if best is None else offset + best

    def spans(self, text: str, detected: Iterable[Span]) -> list[tuple[Span, str]]:
        """What is to be hidden in `text`, in order and apart, with its placeholders: what was `detected` in it, whose
        values become known, and what is known."""
        detected = list(detected)
        for span in detected:
            self.add(text[span.start : span.end], span.kind)
        known = self.known(text)
        named: dict[tuple[int, int], str] = {}
        for span, placeholder in known:
            named.setdefault((span.start, span.end), placeholder)
        whole = united([*detected, *(span for span, _ in known)])
        return [
            (span, named.get((span.start, span.end)) or self.add(text[span.start : span.end], span.kind))
            for span in whole
        ]

    def redact(self, text: str, detected: Iterable[Span]) -> str:
        parts, at = [], 0
        for span, placeholder in self.spans(text, detected):
            parts += [text[at : span.start], placeholder]
            at = span.end
        return "".join([*parts, text[at:]])


class Restoring:
    """Puts values back where a placeholder comes in a text that streams in, however that is cut into pieces."""

    def __init__(self, redaction: Redaction) -> None:
        self._values = redaction.values
        self._held = ""

    def push(self, text: str, *, final: bool = False) -> str:
        """What may be shown already: all but an end that may yet become a placeholder."""
        self._held += text
        if not self._values:
            shown, self._held = self._held, ""
            return shown
        keep = 0 if final else self._partial()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        pattern = "|".join(map(re.escape, self._values))
        return re.sub(pattern, lambda match: self._values[match[0]], shown)

    def _partial(self) -> int:
        begin = self._held.rfind("[")
        if begin < 0:
            return 0
        end = self._held[begin:]
        return len(end) if any(one.startswith(end) and one != end for one in self._values) else 0


def _aliases(written: str, kind: Kind) -> Iterable[_Alias]:
    yield _Alias(_lower(written).strip(), kind)
    if kind is Kind.NAME:
        words = [word.strip(".,") for word in written.split()]
        yield from (_Alias(word, kind, cased=True) for word in words if len(word) > 1 and word[0].isupper())
    elif kind is Kind.EMAIL:
        yield _Alias(_lower(written.partition("@")[0]), kind)
    elif kind is Kind.URL:
        rest = _lower(written.partition("://")[2])
        login = rest.partition("@")[0] if "@" in rest else ""
        yield from (_Alias(part, kind) for part in (rest, login, login.partition(":")[2]) if len(part) > 2)
        yield from (_Alias(value, kind) for value in re.findall(r"[?&#;][\w-]+=([^&\s]{6,})", rest))
    elif kind is Kind.ADDRESS:
        yield from (_Alias(part, kind) for part in re.split(r",\s*|\n\s*", _lower(written)) if re.search(r"\d", part))


def _occurrences(text: str, alias: _Alias) -> Iterable[tuple[int, int]]:
    """Of an alias that is long enough, beginnings as well: what was broken off gives it away too."""
    whole = alias.text
    wordy = alias.kind in _WORDY or len(whole) < _GRAM
    head = whole if wordy else whole[:_GRAM]
    at = text.find(head)
    while head and at >= 0:
        end = at + len(head)
        while not wordy and end - at < len(whole) and end < len(text) and text[end] == whole[end - at]:
            end += 1
        if not wordy or not (_inside_word(text, at) or _inside_word(text, end)):
            yield at, end
        at = text.find(head, end)


def _inside_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _lower(text: str) -> str:
    """In lower case, each character still at its place."""
    return (
        "".join(low if len(low := char.lower()) == 1 else char for char in text) if not text.isascii() else text.lower()
    )


def _digits(text: str) -> str:
    return "".join(char for char in text if char.isdigit())


def _normal(written: str) -> str:
    """Equal for two ways of writing one value."""
    digits = _digits(written)
    letters = any(map(str.isalpha, written))
    return " ".join(written.casefold().split()) if letters or not digits else digits
