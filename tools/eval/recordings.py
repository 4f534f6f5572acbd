"""Model passes that are made once: each prompt's recording is a file of arrays in the cache, named by a hash of
everything that went into it, written whole or not at all. A file that cannot be read is made again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from models.engine.base import Engine, Step, Tokenizer
from models.engine.gguf import GgufEngine, GgufTokenizer
from models.fingerprint import fingerprint
from protocol.errors import StoreError
from protocol.resolve import Message
from tools.eval.tasks import Prompt

BATCH = 8  # sequences per forward pass: decoding is bound by memory, so eight cost little more than one
_CONTEXT = 8192  # tokens, for BATCH answers at once

Progress = Callable[[str], None]
R = TypeVar("R")  # a dataclass of arrays


class Model:
    """A model file, loaded when it is first needed. `hidden`: its recordings keep the last hidden states."""

    def __init__(self, path: Path, *, threads: int, hidden: bool) -> None:
        self.path = path
        self.hidden = hidden
        self._threads = threads

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.path)

    @cached_property
    def engine(self) -> Engine:
        return GgufEngine(self.path, context=_CONTEXT, sequences=BATCH, threads=self._threads, hidden=self.hidden)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return GgufTokenizer.open(self.path)

    def close(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()
            del self.engine


def name(*parts: Any, messages: Sequence[Message]) -> str:
    """A file name that is another one whenever anything that went into a recording is."""
    whole = msgspec.json.encode([*parts, [[message.role, message.content] for message in messages]])
    return f"{hashlib.sha256(whole).hexdigest()[:32]}.npz"


def recorded(
    kind: type[R],
    paths: Sequence[Path],
    record: Callable[[Sequence[int]], Iterable[R]],
    say: Progress,
) -> list[R]:
    """The recordings at `paths`; what is missing comes from `record`, which is given up to BATCH indices at a time.
    Raises StoreError."""
    found = [load(kind, path) for path in paths]
    missing = [index for index, recording in enumerate(found) if recording is None]
    for at in range(0, len(missing), BATCH):
        wave = missing[at : at + BATCH]
        for index, recording in zip(wave, record(wave), strict=True):
            save(paths[index], recording)
            found[index] = recording
        say(f"{at + len(wave)}/{len(missing)}")
    return [recording for recording in found if recording is not None]


def save(path: Path, recording: Any) -> None:
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole.open("wb") as file:
            np.savez(file, allow_pickle=False, **{column: getattr(recording, column) for column in recording.__slots__})
        whole.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            whole.unlink()
        raise StoreError(
            f"{path.parent}: a recording cannot be written: {error.strerror}; make room, or name another folder"
        ) from None


def load(kind: type[R], path: Path) -> R | None:
    try:
        with np.load(path, allow_pickle=False) as columns:
            return kind(**{column: columns[column] for column in kind.__slots__})  # type: ignore[attr-defined]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def drive(
    engine: Engine, starts: Sequence[list[int]], prompts: Sequence[Prompt], choose: Callable[[int, Step], int | None]
) -> None:
    """Feeds each prompt, then what `choose` makes of each step, until it says None; all sequences in one batch."""
    places = [engine.open(s, 2 * p.max_tokens + 8) for s, p in zip(starts, prompts, strict=True)]
    feeds = {index: place.align(start) for index, (place, start) in enumerate(zip(places, starts, strict=True))}
    while feeds:
        made = engine.forward([(places[index], feed) for index, feed in feeds.items()])
        chosen = {index: choose(index, step) for index, step in zip(list(feeds), made, strict=True)}
        feeds = {index: [token] for index, token in chosen.items() if token is not None}
    for place in places:
        place.close()
