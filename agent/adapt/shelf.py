"""The adapters in use, and which of them a request is written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.adapt.router import Floats, Router
from agent.adapt.store import OWN, PRIVATE
from models import adapter as adapters
from models.engine.base import Engine, Mix
from protocol.errors import RequestError

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class Shelved:
    """`centroid` None: used by name alone."""

    slot: str
    id: str
    path: Path
    centroid: Floats | None


@dataclass(frozen=True, slots=True)
class Used:
    """`weight`: the adapter's share of a mix, 1 if it is used alone."""

    slot: str
    id: str
    weight: float


class Shelf:
    """`replace` and `check` are for any thread, `choose` for the engine's. `run` does something on the engine's thread
    and waits for it. `router` None: adapters are used by name alone."""

    def __init__(self, engine: Engine, run: Callable[[Callable[[], None]], None], router: Router | None = None) -> None:
        self.entries: tuple[Shelved, ...] = ()  # replaced as a whole
        self._engine = engine
        self._run = run
        self._router = router

    def replace(self, in_use: Mapping[str, Path]) -> None:
        """These adapters, by slot, are used by requests that come from now on. Those that are being written keep theirs
        to their end. Raises BadAdapter, and then everything is as it was."""
        found = {slot: (path, adapters.read(path).centroid) for slot, path in sorted(in_use.items())}
        self._run(lambda: self._swap(found))

    def _swap(self, found: Mapping[str, tuple[Path, Floats | None]]) -> None:
        try:
            self.entries = tuple(
                Shelved(slot, self._engine.attach(path), path, centroid) for slot, (path, centroid) in found.items()
            )
        finally:
            for id in self._engine.attached - {entry.id for entry in self.entries}:
                self._engine.detach(id)

    def check(self, asked: str, *, private: bool) -> None:
        """Raises RequestError if a request may not have this adapter."""
        if asked not in (AUTO, NONE):
            self._named(asked, private)

    def choose(self, asked: str, prompt: Sequence[int], *, private: bool) -> tuple[Used, ...]:
        """What a request is written with; () is the bare model. `asked`: auto, none, a slot, or how an id begins. auto
        reads the prompt with the bare model, if there is something to choose from. Raises RequestError."""
        if asked == NONE:
            return ()
        if asked != AUTO:
            entry = self._named(asked, private)
            return (Used(entry.slot, entry.id, 1.0),)
        candidates = {entry.id: entry for entry in self._candidates(private)}
        centroids = [(id, entry.centroid) for id, entry in candidates.items() if entry.centroid is not None]
        if self._router is None or not centroids:
            return ()
        mix = self._router.choose(self._engine, prompt, centroids)
        return tuple(Used(candidates[id].slot, id, share) for id, share in mix)

    def _candidates(self, private: bool) -> list[Shelved]:
        """What learned from private requests might say so in other ones, so it writes private ones alone; there it
        stands for the own one, which knows less."""
        slots = {entry.slot for entry in self.entries}
        barred = OWN if private and PRIVATE in slots else None if private else PRIVATE
        return [entry for entry in self.entries if entry.slot != barred]

    def _named(self, asked: str, private: bool) -> Shelved:
        named = [entry for entry in self.entries if entry.slot == asked]
        named = named or [entry for entry in self.entries if entry.id.startswith(asked)]
        if len({entry.id for entry in named}) != 1:
            problem = "more than one adapter in use begins with" if named else "no adapter in use is called"
            raise RequestError(f"{problem} {asked!r}: `skerry adapt list` shows them", "skerry.adapter")
        if named[0].slot == PRIVATE and not private:
            raise RequestError(
                f"the adapter {asked!r} has learned from private requests and writes only such: send private: true",
                "skerry.adapter",
            )
        return named[0]


def mix_of(used: Sequence[Used]) -> Mix:
    return tuple(sorted((one.id, one.weight) for one in used))
