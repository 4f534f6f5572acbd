"""Postal addresses, by the forms that they have in some countries of Europe and in North America."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agent.privacy.span import Kind, Span

_CAPS = r"[A-ZÀ-ÖØ-Þ][\w'’-]*\.?"
_TYPE = (
    r"(?:Street|Str|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Boulevard|Blvd|Way|Close|Crescent"
    r"|Terrace|Gardens|Grove|Hill|Row|Parkway|Pkwy|Highway|Hwy|Circle|Mews|Walk)\b\.?"
)
_TAIL = (  # flat, city, state, post code
    rf"(?:,?[ \t]+(?:Apt|Apartment|Flat|Suite|Unit|#)\.?[ \t]*[\w-]+)?(?:,?\s+{_CAPS}(?:[ \t]{_CAPS}){{0,2}})?"
    r"(?:,?\s+(?:[A-Z]{2}\s+)?(?:\d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]?\s?\d[A-Z]{2})\b)?"
)
_ROMANCE = r"(?:rue|avenue|av\.?|boulevard|bd|place|chemin|impasse|allée|quai|cours)"
_IBERIAN = r"(?:Calle|C/|Avenida|Avda\.?|Plaza|Paseo|Via|Viale|Piazza|Corso|Rua|Praça|Largo)"
_FORMS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b\d{{1,5}}[A-Za-z]?[ \t]+(?:[NSEW]\.?[ \t]+)?(?:{_CAPS}[ \t]+){{1,3}}{_TYPE}{_TAIL}",
        r"\b[A-ZÄÖÜ][\wäöüß-]*(?:straße|strasse|str\.|weg|platz|allee|gasse|ring|damm|ufer|laan|straat|plein|gade|gatan"
        r"|vej)[ \t]+\d{1,4}[ ]?[a-zA-Z]?\b(?:,?\s+(?:[A-Z]{1,2}-)?\d{4,5}(?:[ ]?[A-Z]{2})?[ \t]+[A-ZÄÖÜ][\w-]+)?",
        rf"\b\d{{1,4}}(?:[ ]?(?:bis|ter))?,?[ \t]+(?i:{_ROMANCE})[ \t]+"
        rf"(?:(?:de|du|des|la|le|les|l['’]|d['’])[ \t]*)*{_CAPS}(?:[ \t-]{_CAPS})*"
        rf"(?:,?\s+\d{{5}}[ \t]+{_CAPS}(?:[ -]{_CAPS})*)?",
        rf"\b{_IBERIAN}[ \t]+(?:(?:de|del|la|las|los|di|da|do|dos|das)[ \t]+)*{_CAPS}"
        rf"(?:[ \t]+(?:(?:de|del|la)[ \t]+)*{_CAPS})*,?[ \t]+(?:n[.º°]+[ ]?)?\d{{1,4}}\b"
        rf"(?:,?\s+\d{{4,5}}[ \t]+{_CAPS})?",
        r"\bP\.?[ ]?O\.?[ ]?Box[ \t]+\d{1,6}\b" + _TAIL,
        r"\b(?:[A-PR-UWYZ][A-HK-Y]?\d[A-Z\d]?[ ]\d[ABD-HJLNP-UW-Z]{2})\b",  # a British post code
    )
)


def find(text: str) -> Iterator[Span]:
    if not any(map(str.isdigit, text)):
        return
    for form in _FORMS:
        for match in form.finditer(text):
            yield Span(match.start(), match.end(), Kind.ADDRESS, 0.7)
