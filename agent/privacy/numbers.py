"""Numbers that belong to a person: phones (`phonenumbers`), cards, IBANs and national ids (`python-stdnum`).

A check digit alone says little of a bare run of digits: one order number in ten has a right one. So what is only digits
needs its own grouping, a date inside, or a cue before it.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agent.privacy.span import Kind, Span
from protocol.errors import ConfigError

_CUE_REACH = (
    48  # characters before a number in which its cue may stand, in the same sentence and before no other number
)
_BEFORE_CUE = re.compile(r".*[\d\n;?!]|.*\.\s", re.DOTALL)
_HELD = re.compile(
    r"(?<!\w)(?:[A-Za-z]{1,6}[ -]?)?\d[\w./+-]*(?: [\w./+-]*\d[\w./+-]*)*|[A-Za-z]{4,6}\d[\dA-Za-z]+"
)  # may hold an id
_RUN = re.compile(r"(?<![\w.])[+(]{0,2}\d(?:[ \t\u00a0./()\u2010-\u2013-]{0,3}\d){6,}(?!\w)")
_DATED = re.compile(
    r"\d{4}([-/.])\d{1,2}\1\d{1,2}(?:[T ]\d{1,2}:\d\d)?|\d{1,2}([-/.])\d{1,2}\2(?:19|20)\d\d|\d{1,2}:\d\d"
)
_ISBN = re.compile(r"\bISBN(?:-1[03])?:?\s*$", re.IGNORECASE)
_PHONE_CUE = re.compile(
    r"\b(?:phone|tele(?:ph|f)\w*|tel|call|ring|mobile|cell|fax|whatsapp|text|sms|dial|reach|handy|rufnummer|ruf\w*|mobil"
    r"|portable|m[oó]vil|cellulare|contact|number is)\b",
    re.IGNORECASE,
)
_ID_CUE = re.compile(
    r"\b(?:id|ssn|sin|tfn|nhs|bsn|nif|cpf|egn|pps|tax|tin|social security|insurance|national|identity|identification"
    r"|passport|licen[cs]e|steuer\w*|ausweis\w*|patient|citizen|aadhaar|kimlik|s[eé]curit[eé] sociale)\b",
    re.IGNORECASE,
)
_TOLD_ID = re.compile(
    r"\b(?:passport|driv(?:er'?s|ing) licen[cs]e|national id|identity card|id card|tax id|social security"
    r"|(?:national|health|social) insurance|personalausweis|reisepass)(?: card| number| no\b\.?| nr\b\.?| #)*"
    r"(?:\s*[:=#]\s*|\s+(?:is|was|ist)\s+|\s+)(?P<value>[A-Z0-9](?:[ -]?[A-Z0-9]){4,19})",
    re.IGNORECASE,
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{1,4}){3,8}\b", re.IGNORECASE)
_CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|6(?:011|5\d\d|4[4-9]\d)\d{12}|62\d{14,17}"
)

# Module of stdnum, how it is written, and whether that needs a cue.
_IDS = (
    ("us.ssn", r"\d{3}-\d{2}-\d{4}", False),
    ("us.ssn", r"\d{9}", True),
    ("gb.nhs", r"\d{3}[ -]?\d{3}[ -]?\d{4}", True),
    ("de.idnr", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", False),
    ("fr.nir", r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d", False),
    ("es.dni", r"\d{8}[- ]?[A-Z]", False),
    ("es.nie", r"[XYZ][- ]?\d{7}[- ]?[A-Z]", False),
    ("it.codicefiscale", r"[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]", False),
    ("nl.bsn", r"\d{9}", True),
    ("be.nn", r"\d\d\.?\d\d\.?\d\d-?\d{3}\.?\d\d", False),
    ("pl.pesel", r"\d{11}", False),
    ("se.personnummer", r"\d{6}(?:\d\d)?[-+]\d{4}", False),
    ("fi.hetu", r"\d{6}[-+A]\d{3}[0-9A-Z]", False),
    ("dk.cpr", r"\d{6}-\d{4}", False),
    ("no.fodselsnummer", r"\d{6} ?\d{5}", False),
    ("ch.ssn", r"756\.?\d{4}\.?\d{4}\.?\d\d", False),
    ("br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d", False),
    ("br.cpf", r"\d{11}", True),
    ("in_.aadhaar", r"\d{4} \d{4} \d{4}", False),
    ("in_.aadhaar", r"\d{12}", True),
    ("in_.pan", r"[A-Z]{3}[ABCFGHLJPTK][A-Z]\d{4}[A-Z]", False),
    ("ca.sin", r"\d{3}[ -]\d{3}[ -]\d{3}", False),
    ("ca.sin", r"\d{9}", True),
    ("au.tfn", r"\d{3} ?\d{3} ?\d{2,3}", True),
    ("cn.ric", r"\d{17}[\dX]", False),
    ("kr.rrn", r"\d{6}-\d{7}", False),
    ("mx.curp", r"[A-Z]{4}\d{6}[A-Z]{6}[0-9A-Z]\d", False),
    ("tr.tckimlik", r"\d{11}", True),
    ("za.idnr", r"\d{6} ?\d{4} ?\d ?\d\d", False),
    ("cz.rc", r"\d{6}/\d{3,4}", False),
    ("ro.cnp", r"\d{13}", False),
    ("bg.egn", r"\d{10}", True),
    ("pt.nif", r"\d{9}", True),
    ("ie.pps", r"\d{7}[A-W][A-IW]?", False),
)
_NINO = re.compile(r"\b[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Id:
    pattern: re.Pattern[str]
    valid: Callable[[str], bool]
    cue: bool


class Numbers:
    """`regions`: countries whose phone numbers are known without +, two letters each. Loads the libraries. Raises
    ConfigError for a region that there is not."""

    def __init__(self, regions: Sequence[str]) -> None:
        self._phonenumbers: Any = importlib.import_module("phonenumbers")
        for region in regions:
            if region.upper() not in self._phonenumbers.SUPPORTED_REGIONS:
                raise ConfigError(f"privacy.regions: {region!r} is no country: write two letters, such as GB or DE")
        self._regions = tuple(dict.fromkeys(region.upper() for region in regions)) or (None,)
        self._luhn, self._iban, self._isbn = (_valid(name) for name in ("luhn", "iban", "isbn"))
        self._ids = [
            _Id(re.compile(rf"(?<![\w.+-]){written}(?![\w-])", re.IGNORECASE), _valid(name), cue)
            for name, written, cue in _IDS
        ]

    def find(self, text: str) -> Iterator[Span]:
        if not any(map(str.isdigit, text)):
            return
        yield from self._phones_and_cards(text)
        yield from self._ibans(text)
        for held in _HELD.finditer(text):
            if sum(map(str.isdigit, held[0])) >= 6:
                yield from self._national(text, held.start(), held.end())
        for match in _NINO.finditer(text):
            yield Span(match.start(), match.end(), Kind.ID, 0.9)
        for match in _TOLD_ID.finditer(text):
            if sum(map(str.isdigit, match["value"])) >= 4:
                yield Span(match.start("value"), match.end("value"), Kind.ID, 0.7)

    def _national(self, text: str, start: int, end: int) -> Iterator[Span]:
        for one in self._ids:
            for match in one.pattern.finditer(text, start, end):
                if (not one.cue or _cued(_ID_CUE, text, match.start())) and one.valid(_plain(match[0])):
                    yield Span(match.start(), match.end(), Kind.ID, 0.7 if one.cue else 0.9)

    def _phones_and_cards(self, text: str) -> Iterator[Span]:
        # Dates and times are written over, so that no number is found across them; lengths stay.
        undated = _DATED.sub(lambda match: "x" * len(match[0]), text)
        for run in _RUN.finditer(undated):
            if self._is_isbn(text, run.start(), run[0]):
                continue
            yield from self._cards(run.start(), run[0])
            yield from self._phones(text, run.start(), run[0])

    def _is_isbn(self, text: str, start: int, run: str) -> bool:
        digits = _digits(run)
        said = _ISBN.search(text[max(0, start - 12) : start]) is not None
        return said or (len(digits) == 13 and digits.startswith(("978", "979")) and self._isbn(digits))

    def _cards(self, start: int, run: str) -> Iterator[Span]:
        """Any run of whole groups: other numbers may stand beside it."""
        groups = list(re.finditer(r"\d+", run))
        for first, begin in enumerate(groups):
            digits = ""
            for end in groups[first:]:
                digits += _digits(end[0])
                if len(digits) > 19 or digits[0] not in "23456":
                    break
                if _CARD.fullmatch(digits) and self._luhn(digits):
                    yield Span(start + begin.start(), start + end.end(), Kind.CARD, 0.9)

    def _phones(self, text: str, start: int, run: str) -> Iterator[Span]:
        for region in self._regions:
            for match in self._phonenumbers.PhoneNumberMatcher(run, region):
                international = match.raw_string.startswith("+") or run[: match.start].endswith("+")
                grouped = not match.raw_string.isdigit() or match.raw_string.startswith("0")
                cued = _cued(_PHONE_CUE, text, start)
                if international or grouped or cued:
                    sure = 0.9 if international else 0.7 if cued else 0.5
                    yield Span(start + match.start, start + match.end, Kind.PHONE, sure)

    def _ibans(self, text: str) -> Iterator[Span]:
        for match in _IBAN.finditer(text):
            written = match[0]
            while len(written) > 14 and not self._iban(_plain(written)):  # words may follow it
                written = re.sub(r"[ -]?[A-Za-z0-9]+$", "", written)
            if len(written) > 14:
                yield Span(match.start(), match.start() + len(written), Kind.IBAN, 0.9)


def _valid(name: str) -> Callable[[str], bool]:
    valid: Callable[[str], bool] = importlib.import_module(f"stdnum.{name}").is_valid
    return valid


def _cued(cue: re.Pattern[str], text: str, start: int) -> bool:
    before = _BEFORE_CUE.sub("", text[max(0, start - _CUE_REACH) : start].rstrip("+( "), count=1)
    return cue.search(before) is not None


def _digits(text: str) -> str:
    return "".join(str(unicodedata.digit(char)) for char in text if char.isdigit())


def _plain(text: str) -> str:
    """With ASCII digits, upper case."""
    return "".join(str(unicodedata.digit(char)) if char.isdigit() else char for char in text).upper()
