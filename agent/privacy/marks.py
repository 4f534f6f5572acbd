"""What its own form gives away: mail and network addresses, credentials, dates of birth."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from agent.privacy.span import Kind, Span

_EMAIL = re.compile(r"[\w.+'%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_][\w-]{1,23}")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]{1,12}://(?P<rest>[^\s<>\"'`]+)", re.IGNORECASE)
_URL_LOGIN = re.compile(r"[^/?#@:]{1,256}:[^/?#]{0,256}@")
_URL_KEY = re.compile(
    r"[?&#;](?:\w*(?:token|secret|password|passwd|pwd|signature)|(?:api[_-]?)?key|sig|auth|code)=[^&\s]{6,}",
    re.IGNORECASE,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_VERSION = re.compile(
    r"(?:\b(?:version|release|firmware|build|v|ver|section|chapter)\.?\s*|[=<>~^]=?\s*)$", re.IGNORECASE
)
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9a-f:]*\d)(?:[0-9a-f]{0,4}:){3,7}[0-9a-f]{0,4}(?!\w|:\w)", re.IGNORECASE)
_MAC = re.compile(r"(?<![\w:-])[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}(?![\w:-])", re.IGNORECASE)
_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bxox[abprs]-[\w-]{10,}"
    r"|\bAIza[\w-]{30,}|\bsk[-_][\w-]{16,}|\bglpat-[\w-]{16,}|\bhf_[A-Za-z0-9]{20,}|\beyJ[\w-]{8,512}\.[\w-]{8,}(?:\.[\w-]*)?"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
SECRET_CUE = (
    r"\b(?P<mine>(?:my|our|the|your|new|old|her|his)\s+)?(?:\w+[_-])?(?:pass(?:word|wd|phrase|code)|pwd|passwort|kennwort"
    r"|mot de passe|contraseña|api[ _-]?key|access[ _-]?key|secret(?:[ _-]?key)?|(?:access|auth|bearer|api)[ _-]?token"
    r"|pin(?:[ -]?(?:code|number))?|cvv|cvc|otp)\b[\"']?(?P<link>\s*(?:is|was|ist|est|es|:|=|:=|=>)\s*)"
)
_SECRET = re.compile(
    SECRET_CUE + r"(?P<value>\"[^\"\n]{3,}\"|'[^'\n]{3,}'|`[^`\n]{3,}`|[^\s\"'`,;]{3,})", re.IGNORECASE
)
_SECRET_WORDS = ("pass", "pwd", "kennwort", "contraseña", "key", "secret", "token", "pin", "cvv", "cvc", "otp")
_KEY_WORDS = ("AKIA", "ASIA", "gh", "xox", "AIza", "sk", "glpat", "hf_", "eyJ", "-----BEGIN")
_CALL = re.compile(r"[\w.]+[(\[]|[A-Za-z_]+\.[A-Za-z_.]+$|\$\{?\w+\}?$|<\w+>$|\{+\w+\}+$")  # code, not a value
_BIRTH_CUE = (
    r"(?:\bborn(?:\s+on)?(?:\s+the)?|\bdate of birth|\bbirth\s?da(?:y|te)|\bd\.?o\.?b\b\.?|\bgeboren(?:\s+am)?"
    r"|\bgeburts(?:datum|tag)|\bn[ée]e?\s+le|\bdate de naissance|\bfecha de nacimiento|\bnacid[oa]\s+el"
    r"|\bdata di nascita|\bnat[oa]\s+il)"
)
_MONTH = r"[^\W\d_]{3,10}\.?"
_DATE = (
    rf"\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\d{{1,2}}[-/.]\s?\d{{1,2}}[-/.]\s?\d{{2,4}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th|\.)?\s+(?:of\s+|de\s+)?{_MONTH},?(?:\s+de)?\s+\d{{4}}|{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}"
)
_BIRTH_WORDS = (
    "born",
    "birth",
    "dob",
    "d.o.b",
    "geboren",
    "geburt",
    "né",
    "nee le",
    "naissance",
    "nacim",
    "nacid",
    "nascita",
    "nat",
)
_BIRTH = re.compile(rf"{_BIRTH_CUE}(?:\s+(?:is|was|ist|est|es))?\s*[:=(]?\s*(?P<value>{_DATE})", re.IGNORECASE)


def find(text: str) -> Iterator[Span]:
    low = text.lower()  # looked through for what a pattern cannot do without, which is quick
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Span(match.start(), match.end(), Kind.EMAIL, 0.9)
    if "://" in text:
        for match in _URL.finditer(text):
            if _URL_LOGIN.match(match["rest"]) or _URL_KEY.search(match["rest"]):
                yield Span(match.start(), match.end(), Kind.URL, 0.9)
    yield from _network(text)
    if any(word in text for word in _KEY_WORDS):
        for match in _KEY.finditer(text):
            yield Span(match.start(), match.end(), Kind.SECRET, 0.9)
    if any(word in low for word in _SECRET_WORDS):
        for match in _SECRET.finditer(text):
            if (span := _secret(match)) is not None:
                yield span
    if any(word in low for word in _BIRTH_WORDS):
        for match in _BIRTH.finditer(text):
            yield Span(match.start("value"), match.end("value"), Kind.BIRTH, 0.7)


def _network(text: str) -> Iterator[Span]:
    if text.count(".") >= 3:
        yield from _ipv4(text)
    if text.count(":") >= 3 or text.count("-") >= 5:
        for match in _IPV6.finditer(text):
            if _is_ip(match[0]):
                yield Span(match.start(), match.end(), Kind.IP, 0.9)
        for match in _MAC.finditer(text):
            yield Span(match.start(), match.end(), Kind.MAC, 0.9)


def _ipv4(text: str) -> Iterator[Span]:
    for match in _IPV4.finditer(text):
        if not _VERSION.search(text[max(0, match.start() - 16) : match.start()]) and _is_ip(match[0]):
            yield Span(match.start(), match.end(), Kind.IP, 0.7)


def _is_ip(written: str) -> bool:
    try:
        ipaddress.ip_address(written)
    except ValueError:
        return False
    return True


def _secret(match: re.Match[str]) -> Span | None:
    """A value after a cue, unless it reads like a sentence about passwords, or like code."""
    value, start = match["value"], match.start("value")
    quoted = value[0] in "\"'`"
    if quoted:
        value, start = value[1:-1], start + 1
    else:
        value = value.rstrip(".!?)]}>")
        said = match["link"].strip().lower()
        mine = (match["mine"] or "").strip().lower() in ("my", "our")
        odd = any(not char.isalpha() for char in value.rstrip("-")) or value[1:] != value[1:].lower()
        if _CALL.match(value) or not (odd or (mine and said in (":", "="))):
            return None
    return Span(start, start + len(value), Kind.SECRET, 0.7) if len(value) >= 3 else None
