"""The adapters of a device, and which of them are in use.

    <model>/<id>.gguf          an adapter; its id is the SHA-256 of this file
    <model>/<id>.json          its manifest; stays when the adapter was refused or removed
    <model>/states/000017.json which adapter is in which slot; each change is a new, higher number

States are never changed, so the newest whole one is what holds, and a rollback is an old one under a new number.
Several processes may use the folder: each change is made under a lock, and `number` tells that there was one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from agent.adapt import files
from agent.adapt.job import Verdict
from models import adapter as adapters
from models.adapter import Adapter
from protocol.errors import BadAdapter, StoreError, StoreInUse
from protocol.folder_lock import FolderLock

log = logging.getLogger(__name__)

OWN, PRIVATE, FLEET = "own", "own.private", "fleet.0"  # FLEET: what the cluster agreed on
SLOT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_ADAPTERS, _BYTES = 32, 512_000_000  # kept on disk; those in use now or three states ago stay beyond that
_STATES, _MANIFESTS = 64, 256
_PATIENCE_S = 10.0  # for another process' change
_STATE = re.compile(r"(\d+)\.json(\.damaged)?")

Origin = Literal["own", "fleet", "file"]
S = TypeVar("S", bound=msgspec.Struct)


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest. `version`: in the order in which they came. `lessons`: that it was trained on. `private`: with
    lessons that nobody else may learn from, so it never leaves the device. `dropped`: the gate refused it."""

    id: str
    version: int
    origin: Origin
    model: str
    rank: int
    lessons: int
    private: bool
    size: int
    created: float
    verdict: Verdict | None = None
    dropped: bool = False


class State(msgspec.Struct, frozen=True):
    """`slots`: name to id. `of`: the number of the state that a rollback has brought back."""

    number: int = 0
    slots: dict[str, str] = {}
    why: str = ""
    at: float = 0.0
    of: int | None = None


class AdapterStore:
    """For one model, named by its fingerprint. `clock`: seconds since 1970, for people. Raises StoreError."""

    def __init__(self, folder: Path, model: str, clock: Callable[[], float] = time.time) -> None:
        self.model = model
        self._folder = folder / model[:16]
        self._states = self._folder / "states"
        self._clock = clock
        try:
            self._states.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self._states} cannot be made: {error.strerror}") from None

    # What there is

    @property
    def number(self) -> int:
        """Grows with each change, whoever makes it. Costs the listing of a folder."""
        return max((number for number, _ in self._numbers()), default=0)

    def state(self) -> State:
        """The newest whole one; a damaged one is set aside."""
        return next(self._whole_states(), State())

    def adapters(self) -> list[Kept]:
        """All manifests that can be read, oldest first."""
        found = (self._manifest(path) for path in self._folder.glob("*.json"))
        return sorted((kept for kept in found if kept is not None), key=lambda kept: kept.version)

    def manifest(self, id: str) -> Kept | None:
        return self._manifest(self._folder / f"{id}.json")

    def find(self, name: str) -> Kept:
        """By id, the beginning of one, or version. Raises StoreError if there is none or more than one of it."""
        kept = [one for one in self.adapters() if self.path(one.id).exists()]
        wanted = name.removeprefix("v")
        found = [one for one in kept if str(one.version) == wanted] or [one for one in kept if one.id.startswith(name)]
        if len(found) != 1:
            problem = "no adapter" if not found else "more than one adapter"
            raise StoreError(f"{problem} {name!r}: `skerry adapt list` shows what there is")
        return found[0]

    def path(self, id: str) -> Path:
        return self._folder / f"{id}.gguf"

    def in_use(self) -> dict[str, Path]:
        """Slot to file. One that is damaged is set aside, and the last good one of its slot goes on."""
        good = self._good(state := self.state())
        if good != state.slots:
            try:
                with self._locked():
                    good = self._good(self.state())
                    self._write(State(self.number + 1, good, "a damaged adapter was set aside", self._clock()))
            except StoreError as error:
                log.warning("%s", error)
        return {slot: self.path(id) for slot, id in good.items()}

    # Changes

    def add(
        self, path: Path, origin: Origin, *, lessons: int = 0, private: bool = False, verdict: Verdict | None = None
    ) -> Kept:
        """Keeps a copy of the adapter; it is in no slot yet. Raises BadAdapter, StoreError."""
        raw, parsed = self._read(path)
        with self._locked():
            kept = self._keep(raw, parsed, origin, lessons, private, verdict, dropped=False)
            self._trim()
        return kept

    def drop(
        self, path: Path, origin: Origin, *, lessons: int = 0, private: bool = False, verdict: Verdict | None = None
    ) -> Kept:
        """Keeps the numbers of an adapter that the gate refused, and not the adapter."""
        raw, parsed = self._read(path)
        with self._locked():
            return self._keep(raw, parsed, origin, lessons, private, verdict, dropped=True)

    def commit(self, slot: str, id: str | None, why: str) -> int:
        """Puts an adapter into a slot, None empties it; the state's number. Durable when it returns."""
        if not SLOT.fullmatch(slot):
            raise StoreError(f"no slot can be named {slot!r}: lower-case letters, digits, dots and dashes")
        with self._locked():
            if id is not None and not self._whole(id):
                raise StoreError(f"adapter {id[:12]} is not there: `skerry adapt list` shows what there is")
            state = self.state()
            rest = {name: there for name, there in state.slots.items() if name != slot}
            slots = rest if id is None else rest | {slot: id}
            if slots == state.slots:
                return state.number
            return self._write(State(self.number + 1, slots, why, self._clock()))

    def rollback(self) -> State:
        """Back to what was in use before, under a new number; again: to what was in use before that."""
        with self._locked():
            now = self.state()
            since = now.number if now.of is None else now.of
            earlier = [*(state for state in self._whole_states() if state.number < since), State()]
            for before in earlier if since else []:
                if before.slots != now.slots and all(map(self._whole, before.slots.values())):
                    why = f"back to {before.number}"
                    self._write(back := State(self.number + 1, before.slots, why, self._clock(), before.number))
                    return back
        raise StoreError("there is nothing to go back to: no other adapter was in use before")

    # From here on: with the lock, where something is written

    @contextmanager
    def _locked(self) -> Iterator[None]:
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                lock = FolderLock(self._folder, "lock", "the adapters'", "device.folder")
                break
            except StoreInUse:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        try:
            yield
        finally:
            lock.close()

    def _read(self, path: Path) -> tuple[bytes, Adapter]:
        raw = adapters.read_bytes(path)
        parsed = adapters.parse(raw)
        if parsed.model != self.model:
            raise BadAdapter(f"{path}: made for another model ({parsed.model[:12]}, not {self.model[:12]})")
        return raw, parsed

    def _keep(
        self,
        raw: bytes,
        parsed: Adapter,
        origin: Origin,
        lessons: int,
        private: bool,
        verdict: Verdict | None,
        *,
        dropped: bool,
    ) -> Kept:
        id = hashlib.sha256(raw).hexdigest()
        known = self.manifest(id)
        if known is not None and (self._whole(id) or dropped):
            return known
        versions = [kept.version for kept in self.adapters()]
        kept = Kept(
            id=id,
            version=known.version if known is not None else max(versions, default=0) + 1,
            origin=origin,
            model=self.model,
            rank=parsed.rank,
            lessons=lessons,
            private=private or (known is not None and known.private),
            size=len(raw),
            created=self._clock(),
            verdict=verdict,
            dropped=dropped,
        )
        if not dropped:
            files.put(self.path(id), raw)
        files.put(self._folder / f"{id}.json", files.sealed(msgspec.json.encode(kept)))
        return kept

    def _write(self, state: State) -> int:
        files.put(self._states / f"{state.number:06}.json", files.sealed(msgspec.json.encode(state)))
        for number, path in sorted(self._numbers())[:-_STATES]:
            if number < state.number:
                path.unlink(missing_ok=True)
        return state.number

    def _trim(self) -> None:
        states = list(self._whole_states())[:4]
        wanted = {id for state in states for id in state.slots.values()}
        kept = self.adapters()
        there = [one for one in kept if self.path(one.id).exists()]
        size = sum(one.size for one in there)
        for one in there[:-1]:  # the newest was just added
            if len(there) <= _ADAPTERS and size <= _BYTES:
                break
            if one.id not in wanted:
                self._remove(one.id)
                there, size = [other for other in there if other is not one], size - one.size
        for one in kept[:-_MANIFESTS]:
            if not self.path(one.id).exists():
                (self._folder / f"{one.id}.json").unlink(missing_ok=True)

    def _remove(self, id: str) -> None:
        """The adapter, and what memory and learning keep beside it. The manifest stays."""
        for path in self._folder.glob(f"{id}.*"):
            if path.suffix != ".json":
                path.unlink(missing_ok=True)

    # Reading what may be damaged

    def _numbers(self) -> Iterator[tuple[int, Path]]:
        for path in self._states.iterdir():
            if found := _STATE.fullmatch(path.name):
                yield int(found[1]), path

    def _whole_states(self) -> Iterator[State]:
        """Newest first."""
        for _, path in sorted(self._numbers(), reverse=True):
            if path.suffix == ".json" and (state := _decoded(path, State)) is not None:
                yield state

    def _manifest(self, path: Path) -> Kept | None:
        return _decoded(path, Kept)

    def _good(self, state: State) -> dict[str, str]:
        """Its slots, with the last good adapter where the one of this state is damaged."""
        found = {slot: self._last_good(slot, id) for slot, id in state.slots.items()}
        return {slot: id for slot, id in found.items() if id is not None}

    def _last_good(self, slot: str, id: str) -> str | None:
        if self._whole(id):
            return id
        path = self.path(id)
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + ".damaged"))
        log.error("adapter %s is damaged and was set aside; the last good one of slot %s goes on", id[:12], slot)
        others = (state.slots.get(slot) for state in self._whole_states())
        return next((other for other in others if other not in (None, id) and self._whole(other)), None)

    def _whole(self, id: str | None) -> bool:
        try:
            return id is not None and hashlib.sha256(self.path(id).read_bytes()).hexdigest() == id
        except OSError:
            return False


def _decoded(path: Path, kind: type[S]) -> S | None:
    """None: gone meanwhile, or damaged; then it is set aside."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    body = files.unsealed(raw)
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        if body is not None:
            return msgspec.json.decode(body, type=kind)
    log.error("%s is damaged and was set aside", path.name)
    with contextlib.suppress(OSError):
        path.replace(path.with_name(path.name + ".damaged"))
    return None
