"""The devices' model with any adapter: read and trained by the product's own code, every pass kept on disk.

Reading and training are functions of what they are given, so their results are files named by a hash of it. A run that
was interrupted plays again from the beginning and finds what is done already.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.adapt import lesson as lessons_file
from agent.adapt.lesson import Lesson, Target
from agent.adapt.retain import plain
from agent.adapt.train import Base, Recipe, states, states_all, train
from agent.memory.key import CALIBRATION, KeyMaker, space_of
from models.adapter import Adapter, read, write
from models.chat import encode_chat
from models.engine.gguf import GgufTokenizer
from models.engine.threads import physical_cores
from models.fingerprint import fingerprint
from models.sampling import softmax
from server.edge.adapters import Contribution, aggregate
from tools.eval.news import Tokens, branches, labels_product, messages, spelled
from tools.eval.recordings import load, save
from tools.eval.table import Dataset

_VERSION = 2  # raised when a result would come out differently

Rows = NDArray[np.intp]
Floats = NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class View:
    """What the model makes of n texts. `x` (n, K): its distribution over the labels; `keys` (n, 128): as memory sees
    its states there."""

    x: Floats
    keys: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class _Calibration:
    mean: Floats
    deviation: Floats


class Student:
    """`adapter` is an id, "" for the bare model. `threads` 0: all cores."""

    def __init__(self, path: Path, data: Dataset, recipe: Recipe, cache: Path, threads: int, say: Progress) -> None:
        self.path = path
        self.data = data
        self.recipe = recipe
        self.folder = cache / "flywheel"
        self.fingerprint = fingerprint(path)
        self.tokenizer = GgufTokenizer.open(path)
        self._threads = threads or physical_cores()
        self._say = say
        self._written = spelled(self.tokenizer, data.labels)
        self._forks = branches(self._written)
        self.prompts = [encode_chat(self.tokenizer, messages(data.labels, item.text)) for item in data.items]

    @cached_property
    def _base(self) -> Base:
        self._say(f"loading {self.path.stem} for training")
        return Base.load(self.path, self._threads)

    def file(self, adapter: str) -> Path:
        return self.folder / f"{adapter}.gguf"

    def adapter(self, adapter: str) -> Adapter | None:
        return read(self.file(adapter)) if adapter else None

    def keep(self, adapter: Adapter) -> str:
        """Writes the file that would travel, and gives its id."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"new.{os.getpid()}"
        made = write(adapter, path)
        path.replace(self.file(made))
        return made

    def train(self, lessons: Sequence[Lesson], start: str, seed: int, epochs: float) -> str:
        recipe = msgspec.structs.replace(self.recipe, seed=seed, epochs=epochs)
        digest = hashlib.sha256(lessons_file.encode(lessons) + msgspec.json.encode(recipe)).hexdigest()
        note = self.folder / f"{self._name('trained', start, digest)}.json"
        if note.exists() and self.file(made := msgspec.json.decode(note.read_bytes(), type=str)).exists():
            return made
        self._say(f"training on {len(lessons)} lessons")
        whole = [*lessons, *plain(self.tokenizer)]
        made = self.keep(train(self._base, whole, recipe, self.adapter(start), None, lambda progress: None))
        scratch = note.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(msgspec.json.encode(made))
        scratch.replace(note)
        return made

    def merged(self, offered: Sequence[tuple[str, float]]) -> str:
        """What the edge makes of adapters and their weights."""
        contributions = [
            Contribution(f"device-{at}", weight, partial(read, self.file(made)))
            for at, (made, weight) in enumerate(offered)
        ]
        rank = self.recipe.rank
        return self.keep(aggregate(contributions, "flexlora", [rank], self.recipe.alpha)[rank])

    def view(self, adapter: str, rows: Rows) -> View:
        """What the model with the adapter makes of these texts."""
        path = self.folder / f"{self._name('view', adapter, [self.prompts[row] for row in rows.tolist()])}.npz"
        found = load(View, path)
        if found is None:
            found = self._look(adapter, rows)
            save(path, found)
        return found

    def _look(self, adapter: str, rows: Rows) -> View:
        loaded, maker = self.adapter(adapter), self._maker(adapter)
        likely: list[dict[Tokens, float]] = [{} for _ in rows]
        keys = np.zeros((len(rows), 128), np.int8)
        for begun in [(), *(fork for fork in self._forks if fork)]:
            following = list(self._forks.get(begun, ()))
            hidden = states(self._base, loaded, [[*self.prompts[row], *begun] for row in rows.tolist()])
            if not begun:
                keys = np.stack([maker.key(state) for state in hidden])
            if following:
                shares = np.stack([softmax(one) for one in hidden @ self._base.head(following).T])
                for ways, share in zip(likely, shares.tolist(), strict=True):
                    ways |= {(*begun, token): p for token, p in zip(following, share, strict=True)}
        return View(np.stack([labels_product(self._written, ways) for ways in likely]), keys)

    def _maker(self, adapter: str) -> KeyMaker:
        path = self.folder / f"{self._name('calibration', adapter, list(CALIBRATION))}.npz"
        found = load(_Calibration, path)
        if found is None:
            loaded = self.adapter(adapter)
            read = [self.tokenizer.encode(text, start=True) for text in CALIBRATION]
            seen = np.concatenate([states_all(self._base, loaded, ids)[1:] for ids in read]).astype(np.float64)
            found = _Calibration(seen.mean(axis=0).astype(np.float32), seen.std(axis=0).astype(np.float32))
            save(path, found)
        return KeyMaker(space_of(self.fingerprint, adapter), found.mean, found.deviation)

    def lesson(self, row: int, y: Floats) -> Lesson:
        """What an answer of the LLM teaches: its distribution where the labels part first, the tokens of its own
        label behind that."""
        said = self._written[int(y.argmax())]
        first: dict[int, float] = {}
        for label, p in zip(self._written, y.tolist(), strict=True):
            first[label[0]] = first.get(label[0], 0.0) + p
        whole = min(1.0, sum(first.values())) or 1.0
        decided = Target(len(self.prompts[row]), "cloud", list(first), [p / whole for p in first.values()])
        return self._lesson(row, said, Lesson([], [decided], "cloud"))

    def correction(self, row: int, label: int, weight: float) -> Lesson:
        at = len(self.prompts[row])
        said = self._written[label]
        return self._lesson(row, said, Lesson([], [Target(at, "label", [said[0]])], "correction", weight=weight))

    def _lesson(self, row: int, said: Tokens, begun: Lesson) -> Lesson:
        """With the answer `said`, whose first token `begun` is about, and whose others are labels."""
        prompt = self.prompts[row]
        others = [Target(len(prompt) + at, "label", [token]) for at, token in enumerate(said) if at]
        return msgspec.structs.replace(begun, tokens=[*prompt, *said], targets=[*begun.targets, *others])

    def _name(self, *parts: object) -> str:
        whole = msgspec.json.encode([_VERSION, self.fingerprint, self.data.labels, *parts])
        return hashlib.sha256(whole).hexdigest()[:32]
