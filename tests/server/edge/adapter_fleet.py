"""A cluster whose devices share adapters: a real broker, an edge's rounds over real HTTP, and devices, whose adapters
are made at random."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from agent.adapt.federation import AdapterFederation
from agent.adapt.outgoing import Own, ShareOptions
from models.adapter import Adapter, Factors, write
from protocol.adapters import AdapterCall, AdapterOffer, encode
from protocol.topics import ADAPTER_OFFER, Cluster
from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.edge.adapter_combine import ChildCombiner, Combiner
from server.edge.adapter_overview import AdapterOverview, adapter_overview
from server.edge.adapter_rounds import AdapterOptions, AdapterRounds
from server.edge.adapter_store import FOLDER, AdapterStore
from server.edge.blobs import BlobLimits
from server.edge.overview import order
from tests.agent.peers.devices import eventually
from tests.brokers import Mosquitto, Network

HOME = Cluster("home", "A")
MODEL = hashlib.sha256(b"a model").hexdigest()
OPTIONS = AdapterOptions(every=1e6, collect=8e4, spread=0.0, settle=0.05, group=False)
SHARE = ShareOptions(first_retry=0.05, longest_retry=0.3)


def adapter(seed: int, rank: int = 4, width: int = 256, model: str = MODEL) -> Adapter:
    """Around a change that all have in common."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.float32(common.normal(size=shape) + 0.1 * own.normal(size=shape)) * np.float32(0.1)

    factors = {f"blk.{layer}.attn_q": Factors(values(rank, width), values(256, rank)) for layer in range(3)}
    centroid = np.float32(own.normal(size=16))
    return Adapter(model, "llama", 8.0, factors, centroid / np.float32(np.linalg.norm(centroid)))


def delta(of: Adapter, name: str = "blk.1.attn_q") -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    factors = of.factors[name]
    return np.float32(of.alpha / factors.rank) * factors.b @ factors.a


class Device:
    """`considered`: what it was handed, file and slot. `before`: is called when the device looks at its own adapter."""

    def __init__(
        self,
        folder: Path,
        url: str,
        name: str,
        own: Adapter | None,
        lessons: int = 10,
        options: ShareOptions = SHARE,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.before = before
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.considered: list[tuple[Path, str]] = []
        self.lessons = lessons
        self.path = self.folder / "own.gguf"
        if own is not None:
            write(own, self.path)
        self.transport = MqttTransport(MqttOptions(url=url, client_id=name, first_retry=0.05, longest_retry=0.2))
        self.federation = AdapterFederation(
            HOME,
            name,
            self.transport,
            self.folder / "rounds",
            MODEL,
            self.own,
            lambda path, slot: self.considered.append((path, slot)),
            options,
            clock=time.monotonic,
            draw=lambda: 0.5,
        )
        self.federation.start()
        self.transport.start()

    def own(self) -> Own | None:
        self.before()
        return Own(self.path, self.lessons) if self.path.exists() else None

    def close(self) -> None:
        self.federation.close()
        self.transport.close()


class Fleet:
    """One cluster. `speak`: publishes an offer as whoever it likes, once the broker has it."""

    def __init__(self, folder: Path, options: AdapterOptions = OPTIONS) -> None:
        self.folder = folder
        self.options = options
        self.stack = ExitStack()
        self.broker = self.stack.enter_context(Mosquitto(folder / "broker"))
        self.rounds: AdapterRounds | None = None
        self.transport: MqttTransport | None = None
        self.voice = MqttTransport(MqttOptions(url=self.broker.url, client_id="voice", first_retry=0.05))
        self.voice.start()
        self.stack.callback(self.voice.close)
        self.stack.callback(self.end)

    def edge(
        self, combine: Combiner | None = None, limits: BlobLimits | None = None, **options: object
    ) -> AdapterRounds:
        """Started, after the one before it is closed."""
        self.end()
        self.transport = MqttTransport(MqttOptions(url=self.broker.url, client_id="edge", first_retry=0.05))
        chosen = replace(self.options, **options)  # type: ignore[arg-type]
        store = AdapterStore(self.folder / FOLDER)
        self.rounds = AdapterRounds(HOME, self.transport, store, combine or ChildCombiner(), chosen, limits=limits)
        self.transport.on_up, self.transport.on_down = self.rounds.up, self.rounds.down
        self.rounds.start()
        self.transport.start()
        return self.rounds

    def end(self) -> None:
        if self.rounds is not None and self.transport is not None:
            self.transport.close()
            self.rounds.close()
            self.rounds = None

    def device(
        self, name: str, own: Adapter | None, lessons: int = 10, options: ShareOptions = SHARE, url: str = ""
    ) -> Device:
        device = Device(self.folder / "devices", url or self.broker.url, name, own, lessons, options)
        self.stack.callback(device.close)
        return device

    def look(self) -> AdapterOverview:
        return adapter_overview(self.folder)

    def order(self, kind: str, number: int | None = None) -> None:
        """And waits until it is done; for the end of the present round before that, if it is a new one."""
        if kind == "round":
            eventually(lambda: not self.look().state.collecting)
        order(self.folder / FOLDER, kind, number=number)
        eventually(lambda: not self.look().orders)

    def called(self, round: int) -> None:
        eventually(lambda: self.look().state.round == round and bool(self.look().state.collecting))

    def offer(self, name: str, offer: AdapterOffer) -> None:
        eventually(lambda: self.voice.connected)
        gone = threading.Event()
        assert self.voice.publish(HOME.path(ADAPTER_OFFER, name), encode(offer), qos=1, done=gone.set)
        assert gone.wait(30)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def offer_of(raw: bytes, round: int, **values: object) -> AdapterOffer:
    given: dict[str, object] = {"model": MODEL, "rank": 4, "lessons": 10, "bytes": len(raw), "base": 0, **values}
    return AdapterOffer(round=round, id=hashlib.sha256(raw).hexdigest(), **given)  # type: ignore[arg-type]


def call_of(url: str, round: int = 1, **values: object) -> AdapterCall:
    given: dict[str, object] = {"seconds": 60.0, "strategy": "flexlora", "most_bytes": 10**8, **values}
    return AdapterCall(round=round, url=url, **given)  # type: ignore[arg-type]


class Narrow(Network):
    """Freezes by itself once clients have sent `most` bytes through it."""

    def __init__(self, target: int, most: int) -> None:
        self.most = most
        self.stuck = threading.Event()
        super().__init__(target)

    def _pass(self, ready: socket.socket) -> None:
        if len(self.passed) >= self.most:
            self._mode = "frozen"
            self.stuck.set()
            return
        super()._pass(ready)

    def widen(self) -> None:
        self.most = 1 << 40
        self.well()
