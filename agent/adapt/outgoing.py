"""What leaves the device of its own adapter in a round, and what it remembers of rounds."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from agent.adapt import files
from agent.adapt.noise import a_alone, released
from agent.adapt.store import OWN, AdapterStore
from agent.learn.noise import releases_with, spent
from models import adapter as adapters
from models.adapter import Adapter, Floats
from protocol.adapters import AdapterCall, AdapterOffer, Strategy
from protocol.errors import BadAdapter
from protocol.topics import Cluster

_PAST, _SENT = "past.json", "sent.gguf"


class Own(NamedTuple):
    """The adapter that this device has trained, and that others may have."""

    path: Path
    lessons: int


def own_in(store: AdapterStore) -> Own | None:
    """What is in use as the device's own, if it rests on lessons that are not private."""
    kept = store.manifest(store.state().slots.get(OWN, ""))
    return Own(store.path(kept.id), kept.lessons) if kept and kept.lessons and not kept.private else None


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """`share`: what leaves the device. `clip`, `noise`: as in AdapterOffer. `epsilon`, `delta`: the privacy that may be
    spent; 0: no limit. Seconds: `first_retry`, `longest_retry`."""

    share: Literal["all", "a", "none"] = "all"
    clip: float = 1.0
    noise: float = 0.0
    epsilon: float = 0.0
    delta: float = 1e-5
    first_retry: float = 0.5
    longest_retry: float = 60.0


class Past(msgspec.Struct, frozen=True):
    """Of this device in `cluster`. `answered`: the last round that it took part in. `number`: of the last AdapterAgreed
    that it has, `fleet` its adapter. `sent`: hash of what was sent last, `source`, `how`: what it was made from.
    `leaked`: 1 / noise^2 of all that was sent with noise, added up."""

    cluster: str = ""
    answered: int = 0
    number: int = 0
    fleet: str = ""
    source: str = ""
    how: str = ""
    sent: str = ""
    leaked: float = 0.0


class Memory:
    """`past`, which is on the disk under `folder` whenever it has changed."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._path = folder / _PAST
        self.past = _read(self._path, f"{cluster.fleet}/{cluster.name}")

    def change(self, **what: object) -> None:
        """Raises StoreError; nothing has changed then."""
        past = msgspec.structs.replace(self.past, **what)
        files.put(self._path, msgspec.json.encode(past))
        self.past = past


class Outgoing:
    """`own`: the device's own adapter at this time, `fleet`: the agreed one that it has. `gauss`: as in `released`.
    `counts`: gets the reasons for silence. Used by one thread."""

    def __init__(
        self,
        folder: Path,
        model: str,
        own: Callable[[], Own | None],
        fleet: Callable[[], Adapter | None],
        options: ShareOptions,
        memory: Memory,
        gauss: Callable[[int], Floats],
        counts: Counter[str],
    ) -> None:
        self.path = folder / _SENT
        self._model = model
        self._own = own
        self._fleet = fleet
        self._options = options
        self._memory = memory
        self._gauss = gauss
        self._counts = counts

    def offer(self, call: AdapterCall) -> AdapterOffer | None:
        """None: this device has nothing to say, or may not. Raises SkerryError."""
        options = self._options
        if options.share == "none" or not _may(options, call.strategy):
            self._counts["kept_here"] += 1
            return None
        own = self._own()
        if own is None:
            self._counts["nothing_learned"] += 1
            return None
        share: Literal["all", "a"] = "a" if call.strategy == "fedsa" else "all"
        sent = self._prepared(own, share)
        if sent is None:
            return None
        size = self.path.stat().st_size
        if size > call.most_bytes:
            raise BadAdapter(f"it has {size} bytes, and the edge takes {call.most_bytes}")
        return AdapterOffer(
            round=max(call.round, self._memory.past.answered),
            base=self._memory.past.number,
            model=sent.model,
            id=self._memory.past.sent,
            bytes=size,
            rank=sent.rank,
            lessons=1 if options.noise else own.lessons,
            share=share,
            clip=options.clip if options.noise else 0.0,
            noise=options.noise,
        )

    def _prepared(self, own: Own, share: str) -> Adapter | None:
        """What leaves the device, in `path`: the same as before, if that was made from the same. Other noise would
        give more away."""
        path, past, options = self.path, self._memory.past, self._options
        raw = adapters.read_bytes(own.path)
        source = hashlib.sha256(raw).hexdigest()
        how = f"{share} {options.clip:g} {options.noise:g}"
        if (past.source, past.how) == (source, how) and hash_of(path) == past.sent:
            return adapters.read(path)
        adapter = adapters.parse(raw)
        if adapter.model != self._model:
            raise BadAdapter("the device's own adapter is for another model than it serves")
        if options.noise:
            if options.epsilon and self.spent(1) > options.epsilon:
                self._counts["privacy_spent"] += 1
                return None
            self._memory.change(leaked=past.leaked + options.noise**-2)  # before there is anything to send
            adapter = released(adapter, self._fleet(), options.clip, options.noise, self._gauss)
        elif share == "a":
            adapter = a_alone(adapter)
        if share == "all" and not options.noise:
            files.put(path, raw)
        else:
            adapters.write(adapter, path)
        self._memory.change(source=source, how=how, sent=hash_of(path))
        return adapters.read(path)

    def spent(self, more: int = 0) -> float:
        """Epsilon, so far or after so many more; infinite if adapters are sent without noise."""
        noise = self._options.noise
        if not noise:
            return math.inf
        return spent(noise, releases_with(noise, self._memory.past.leaked) + more, self._options.delta)


def _may(options: ShareOptions, strategy: Strategy) -> bool:
    """What the device's owner allows, against what the round takes. Noise is for B with a frozen A alone."""
    if options.noise:
        return strategy == "ffa" and options.share == "all"
    return strategy == "fedsa" or options.share == "all"


def hash_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _read(path: Path, here: str) -> Past:
    """Rounds and numbers of another cluster mean nothing here."""
    try:
        past = msgspec.json.decode(path.read_bytes(), type=Past)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Past(here)
    return past if past.cluster == here else Past(here, leaked=past.leaked)
