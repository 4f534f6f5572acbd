"""A device's part in rounds of adapters, on a bus, with an edge that is only a voice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from agent.adapt.federation import AdapterFederation
from agent.adapt.outgoing import Own, ShareOptions, hash_of, own_in
from agent.adapt.store import AdapterStore
from protocol.adapters import AdapterAgreed, AdapterCall, AdapterGroup, AdapterOffer, Blob, decode_offer, encode
from protocol.topics import ADAPTER_AGREED, ADAPTER_CALL, ADAPTER_OFFER, EDGE, Cluster
from protocol.transport.base import Delivery
from protocol.transport.bus import Bus, BusTransport
from tests.agent.adapt.adapters import MODEL, small_file
from tests.agent.peers.devices import eventually

HOME = Cluster("home", "A")
NOWHERE = "http://127.0.0.1:1/v1/adapters"


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bus = Bus()
        self.offers: list[AdapterOffer] = []
        self.considered: list[tuple[Path, str]] = []
        self.own: Own | None = Own(small_file(folder, 1), 12)
        self.judged: set[str] = set()
        self.edge = BusTransport(self.bus, "edge")
        self.edge.subscribe(HOME.path(ADAPTER_OFFER), self._offered, qos=1)
        self.edge.start()
        self.bus.settle()
        self.device: AdapterFederation | None = None

    def _offered(self, delivery: Delivery) -> None:
        offer = decode_offer(delivery.payload)
        assert offer is not None
        self.offers.append(offer)

    def start(self, options: ShareOptions | None = None, model: str = MODEL, cluster: Cluster = HOME) -> None:
        """The device, after it was ended as by a reboot."""
        self.end()
        self.transport = BusTransport(self.bus, "d")
        self.device = AdapterFederation(
            cluster,
            "d",
            self.transport,
            self.folder / "rounds",
            model,
            lambda: self.own,
            lambda path, slot: self.considered.append((path, slot)),
            options or ShareOptions(first_retry=0.01, longest_retry=0.05),
            clock=time.monotonic,
            draw=lambda: 0.0,
            judged=lambda id: id in self.judged,
        )
        self.device.start()
        self.transport.start()

    @property
    def counts(self) -> dict[str, int]:
        assert self.device is not None
        return dict(self.device.counts)

    def end(self) -> None:
        if self.device is not None:
            self.device.close()
            self.transport.close()

    def call(self, round: int, seconds: float = 60.0, **values: object) -> None:
        given: dict[str, object] = {"strategy": "flexlora", "most_bytes": 10**6, "url": NOWHERE, **values}
        call = AdapterCall(round=round, seconds=seconds, **given)  # type: ignore[arg-type]
        self.edge.publish(HOME.path(ADAPTER_CALL, EDGE), encode(call), qos=1, retain=True)

    def have(self, seed: int) -> Blob:
        """An agreed adapter that is on the device's disk already."""
        raw = small_file(self.folder, seed).read_bytes()
        id = hashlib.sha256(raw).hexdigest()
        (self.folder / "rounds" / "agreed").mkdir(parents=True, exist_ok=True)
        (self.folder / "rounds" / "agreed" / f"{id}.gguf").write_bytes(raw)
        return Blob(id, len(raw))

    def agree(self, number: int, group: AdapterGroup) -> None:
        agreed = AdapterAgreed(number, 1, NOWHERE, [group])
        self.edge.publish(HOME.path(ADAPTER_AGREED, EDGE), encode(agreed), qos=1, retain=True)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.end()
    made.bus.close()


def test_the_offer_says_what_the_file_is(world: World) -> None:
    assert world.own is not None
    raw = world.own.path.read_bytes()
    world.call(7)
    world.start()
    eventually(lambda: bool(world.offers))
    assert world.offers[0] == AdapterOffer(7, 0, MODEL, hashlib.sha256(raw).hexdigest(), len(raw), 2, 12)


def test_a_round_without_an_edge_is_tried_again_and_skipped(world: World) -> None:
    world.call(1, seconds=1.0)
    world.start()
    eventually(lambda: world.counts.get("skipped") == 1)
    assert world.counts["retried"] > 1
    world.call(2, seconds=1.0)
    eventually(lambda: world.counts["skipped"] == 2)
    assert {offer.round for offer in world.offers} == {1, 2}


def test_after_a_reboot_it_says_the_same(world: World) -> None:
    world.call(1, strategy="fedsa")
    world.start(ShareOptions(share="a", first_retry=0.01))
    eventually(lambda: bool(world.offers))
    world.start(ShareOptions(share="a", first_retry=0.01))
    eventually(lambda: len(world.offers) > 1)
    assert world.offers[0] == world.offers[-1]
    assert (world.offers[0].share, world.offers[0].rank) == ("a", 2)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"answered": "many"}'])
def test_a_damaged_memory_is_a_new_beginning(world: World, damage: bytes) -> None:
    (world.folder / "rounds").mkdir()
    (world.folder / "rounds" / "past.json").write_bytes(damage)
    world.call(1)
    world.start()
    eventually(lambda: bool(world.offers))


@pytest.mark.parametrize(
    ("options", "call", "event"),
    [
        (ShareOptions(share="none"), {}, "kept_here"),
        (ShareOptions(share="a"), {}, "kept_here"),
        (ShareOptions(noise=2.0), {}, "kept_here"),
        (ShareOptions(noise=2.0), {"strategy": "ffa"}, "nothing_learned"),  # its A is not the frozen one
        (ShareOptions(), {"most_bytes": 10}, "nothing_learned"),
    ],
)
def test_it_is_silent_where_it_may_not_speak(
    world: World, options: ShareOptions, call: dict[str, object], event: str
) -> None:
    world.call(1, **call)
    world.start(options)
    eventually(lambda: world.counts.get(event) == 1)
    assert world.offers == []


def test_a_lower_round_than_was_answered_is_told_so_once(world: World) -> None:
    (world.folder / "rounds").mkdir()
    (world.folder / "rounds" / "past.json").write_text('{"cluster": "home/A", "answered": 9, "number": 4}')
    world.call(2)
    world.start()
    eventually(lambda: bool(world.offers))
    world.call(2)
    world.bus.settle()
    assert [(offer.round, offer.base) for offer in world.offers] == [(9, 4)]


def test_an_adapter_for_another_model_is_not_offered(world: World) -> None:
    world.call(1)
    world.start(model="cd" * 32)
    eventually(lambda: world.counts.get("nothing_learned") == 1)
    assert world.offers == []


def test_what_was_agreed_for_others_is_let_pass_and_what_is_there_is_considered(world: World) -> None:
    blob = world.have(2)
    world.start()
    world.agree(1, AdapterGroup("cd" * 32, {2: Blob("ef" * 32, 10)}, 1, 1))
    world.agree(3, AdapterGroup(MODEL, {2: blob}, 1, 1))
    eventually(lambda: len(world.considered) == 1)
    world.agree(2, AdapterGroup(MODEL, {2: Blob("ef" * 32, 10)}, 1, 1))
    eventually(lambda: world.counts.get("out_of_date") == 1)
    assert [(path.stem, slot) for path, slot in world.considered] == [(blob.id, "fleet.0")]


@pytest.mark.parametrize("share", ["all", "a"])
def test_what_was_judged_is_judged_again_only_after_something_else_was_agreed(
    world: World, share: Literal["all", "a"]
) -> None:
    group = AdapterGroup(MODEL, {2: world.have(2)}, 1, 1, share)
    world.agree(1, group)
    world.start()
    eventually(lambda: len(world.considered) == 1)
    world.start()
    eventually(lambda: len(world.considered) == 2)  # nobody has looked at it yet
    world.judged.add(hash_of(world.considered[0][0]))
    world.start()
    world.agree(2, group)
    eventually(lambda: world.device is not None and world.device.past.number == 2)
    assert len(world.considered) == (2 if share == "all" else 3), "the own half may have changed since"
    world.agree(3, msgspec.structs.replace(group, blobs={2: world.have(3)}))
    eventually(lambda: world.device is not None and world.device.past.number == 3)
    world.agree(4, group)
    eventually(lambda: world.device is not None and world.device.past.number == 4)
    assert world.considered[-1][0] == world.considered[0][0]
    assert len(world.considered) > (2 if share == "all" else 3), "back to it, after another one"


def test_the_own_adapter_is_that_of_the_time_of_the_call(world: World) -> None:
    world.own = None
    world.call(1)
    world.start()
    eventually(lambda: world.counts.get("nothing_learned") == 1)
    world.own = Own(small_file(world.folder, 3), 7)
    world.call(2)
    eventually(lambda: bool(world.offers))
    assert world.offers[0].id == hash_of(world.own.path)


def test_a_file_that_is_damaged_on_this_disk_is_not_considered(world: World) -> None:
    folder = world.folder / "rounds" / "agreed"
    folder.mkdir(parents=True)
    id = "ef" * 32
    (folder / f"{id}.gguf").write_bytes(b"damaged")
    world.start()
    world.agree(1, AdapterGroup(MODEL, {2: Blob(id, 7)}, 1, 1))
    eventually(lambda: world.counts.get("not_fetched", 0) > 1)
    assert world.considered == []


def test_only_what_rests_on_lessons_of_this_device_that_are_not_private_is_its_own(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", MODEL)
    assert own_in(store) is None
    for seed, private in ((1, True), (2, False)):
        kept = store.add(small_file(tmp_path, seed), "own", lessons=20, private=private)
        store.commit("own", kept.id, "trained")
        assert own_in(store) == (None if private else Own(store.path(kept.id), 20))
