"""Names, by cues, titles and a list of given names. No model: what has neither a cue nor a known given name is not
found."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agent.privacy.given import GIVEN
from agent.privacy.span import Kind, Span

_WORD = r"[^\W\d_](?:[^\W\d_]|['’.-](?=[^\W\d_]))*\.?"
_WORDS = re.compile(rf"{_WORD}(?:[ \t]+{_WORD}){{0,4}}")
_PARTICLES = """
de da di do dos del della van von der den ter la le bin ibn al el y e zu
"""
_STOPS = """
i the a an and or but if in on at to for from with is was are it this that you we he she they my our your his her sir
madam team all everyone everybody customer customers friend friends world there again colleague colleagues hiring
manager editor reader readers student students parent parents guest guests member members santa diary god lord monday
tuesday wednesday thursday friday saturday sunday january february march april may june july august september october
november december street road avenue lane square station university college school hospital park city company inc ltd
llc gmbh corp award prize day please thanks thank regards who what when where why how can could would should do does
did will not no yes also then however best kind dear hi hello hey mr mrs ms dr prof sent subject date email phone tel
address re cc damen herren
"""
_PARTICLE = frozenset(_PARTICLES.split())
_STOP = frozenset(_STOPS.split())
_TITLE = (
    r"(?:Mr|Mrs|Ms|Mx|Miss|Dr|Prof|Professor|Sir|Lady|Rev|Herrn?|Frau|Monsieur|Madame|Mme|Mlle|Señora?|Señorita|Sra?"
    r"|Signora?|Sig|Don|Doña|Fru)\b\.?"
)
_GREETING = (
    r"(?:Dear|Hi|Hello|Hey|Liebe[rs]?|Hallo|Ch[eè]re?|Bonjour|Estimad[oa]|Querid[oa]|Hola|Ciao|Gentile|Car[oa]|Beste)"
    r"\b,?"
)
_STRONG = (
    r"(?:(?:\b(?:my|his|her|their|full|first|last|middle|maiden|family|sur|patient|customer|client|contact|applicant)"
    r"(?:['’]s)?[ -]?)+name(?:\s+is|['’]s|\s*[:=])|(?m:^)\W*name\s*:|\bich hei(?:ß|ss)e|\bje m['’]appelle|\bme llamo"
    r"|\bmi chiamo|\bik heet|\bmein name ist|\bmi nombre es|\bil mio nome è|\bje suis|\bjag heter|\bmeu nome é)"
)
_STRONG_WORDS = (
    *("name is", "name:", "name :", "name=", "name =", "name's", "name’s", "heiße", "heisse", "appelle", "llamo"),
    *("chiamo", "heet", "mein name", "nombre", "suis", "nome", "heter"),
)
_LABEL = (
    r"\b(?:patient|customer|client|contact|employee|tenant|applicant|attn|recipient|sender|signed(?: by)?|author"
    r"|witness|insured|account holder|cardholder|kunde|kundin|patientin|ansprechpartner)\s*[:=]"
)
_KIN = (
    r"\b(?:my|our|his|her)\s+(?:ex-?)?(?:wife|husband|son|daughter|brother|sister|mother|father|mum|mom|dad|boss|friend"
    r"|neighbou?r|colleague|doctor|manager|partner|girlfriend|boyfriend|landlord|teacher|uncle|aunt|cousin|nephew|niece"
    r"|fianc[ée]e?|grandmother|grandfather|assistant|therapist|lawyer|client|patient),?(?:\s+(?:is|called|named))?"
)
_ACTION = re.compile(
    r"(?:\b(?:am|i['’]m|is|call|contact|meet|meeting|met|ask|email|e-mail|with|from|by|to|about|for|named|tell|told"
    r"|invite|remind|and|bin|c['’]est|soy|sono)|[:,])[ \t]+$",
    re.IGNORECASE,
)
_SIGN_OFF = (
    r"(?:(?:best|kind|warm|many)\s+(?:regards|wishes)|regards|sincerely|yours(?:\s+(?:truly|sincerely|faithfully))?"
    r"|cheers|(?:many\s+)?thanks|thank you|love|best|mit freundlichen grüßen|viele grüße|lg|mfg|cordialement|saludos"
    r"|cordiali saluti)[,.!]?[ \t]*\r?\n\s*"
)
_CUES = tuple(  # words without one of which it cannot match, in lower case, and the cue
    (words, re.compile(pattern, flags))
    for words, pattern, flags in (
        (_STRONG_WORDS, _STRONG + r"\s*", re.I),
        ((":", "="), _LABEL + r"\s*", re.I),
        (("",), r"\b" + _TITLE + r"[ \t]+", 0),
        (("",), r"(?m:^|(?<=[\"'.!?\n>:,] )|(?<=[\"'>\n]))" + _GREETING + r"[ \t]+", 0),
        (("my ", "our ", "his ", "her "), _KIN + r"[ \t]+", re.I),
        (("\n",), r"(?m:^)[ \t>]*" + _SIGN_OFF, re.I),
    )
)
_CAPITAL = re.compile(r"(?<![\w@./-])[^\W\d_a-z][^\W\d_]+")


def find(text: str) -> Iterator[Span]:
    low = text.lower()
    for index, (words, cue) in enumerate(_CUES):
        if any(word in low for word in words):
            for match in cue.finditer(text):
                if (end := _name_end(text, match.end(), lower=index == 0)) > match.end():
                    yield Span(match.end(), end, Kind.NAME, 0.7)
    for match in _CAPITAL.finditer(text):
        if match[0].casefold() in GIVEN:
            end = _name_end(text, match.start())
            if end > match.end() + 1 or _ACTION.search(text[max(0, match.start() - 12) : match.start()]):
                yield Span(match.start(), end, Kind.NAME, 0.5)


def _name_end(text: str, start: int, *, lower: bool = False) -> int:
    """Where the name that begins at `start` ends; `start` itself if there is none. `lower`: after such a cue people
    write small."""
    match = _WORDS.match(text, start)
    if match is None:
        return start
    end = start
    for at, word in enumerate(re.finditer(r"\S+", match[0])):
        plain = word[0].rstrip(".").casefold()
        initial = len(plain) == 1 and word[0][0].isupper() and plain != "i"
        if plain in _STOP and not initial:
            break
        if word[0][0].isupper() or (lower and (plain in GIVEN or (at == 1 and end > start))):
            end = start + word.end() - (word[0].endswith(".") and len(plain) > 3)
        elif plain not in _PARTICLE or at == 0:
            break
        if word[0].endswith(".") and len(plain) > 3:  # a sentence ends here
            break
    return end


def may_begin(text: str) -> int | None:
    """Where a name that is being written at the end of `text` begins, its cue not counted."""
    for index, (_, cue) in enumerate(_CUES):
        for match in cue.finditer(text, max(0, len(text) - 120)):
            end = _name_end(text, match.end(), lower=index == 0)
            if not text[end:].strip(" \t"):
                return match.end()
    return None
