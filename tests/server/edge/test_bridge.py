"""Questions between clusters: answered from wherever somebody knows, and never going round."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.peers.resolver import AskOptions
from protocol.errors import ConfigError
from protocol.peers import Answer, Ask, encode
from protocol.topics import ANSWER, ASK, Cluster
from protocol.transport.base import Delivery
from protocol.transport.bus import BusTransport
from server.edge.bridge import BridgeLimits
from server.edge.service import Edge
from tests.agent.peers.devices import eventually
from tests.protocol.entries import SPACE, TAIL, entry, key_of, someone
from tests.server.edge.clusters import World

RING = ["AB", "BC", "CA"]


def question(number: int = 1, id: int = 7, hops: int = 1, visited: list[str] | None = None) -> Ask:
    return Ask(id, SPACE, key_of(number).tobytes(), TAIL, 0.9, hops, visited or [])


def test_a_neighbouring_cluster_answers(tmp_path: Path) -> None:
    with World(tmp_path, "AB", ["AB"]) as world:
        lamp, fridge, door = world.device("A", "lamp"), world.device("B", "fridge"), world.device("B", "door")
        fridge.memory.add([entry(door.who, 1, token=42)])
        world.reachable(lamp)
        eventually(lambda: lamp.network.around.knows(door.who.public))
        reply = lamp.told(1)
        assert reply is not None
        assert reply.tokens == [42]
        eventually(lambda: lamp.knows(1))  # it is kept, with the far device's signature
        assert lamp.network.around.name_of(door.who.public) == "B/door"


def test_what_nobody_knows_is_told_at_once(tmp_path: Path) -> None:
    with World(tmp_path, "AB", ["AB"]) as world:
        lamp = world.device("A", "lamp")
        world.device("B", "fridge")
        world.reachable(lamp)
        assert lamp.told(1) is None


def test_those_nearby_are_asked_first(tmp_path: Path) -> None:
    with World(tmp_path, "AB", ["AB"]) as world:
        lamp, door, fridge = world.device("A", "lamp"), world.device("A", "door"), world.device("B", "fridge")
        door.memory.add([entry(door.who, 1, token=1)])
        fridge.memory.add([entry(fridge.who, 2, token=2)])
        world.reachable(lamp)
        eventually(lambda: lamp.sees(door))
        near = lamp.told(1)
        assert near is not None
        assert not world.topics("A", "/memory/ask/edge")
        far = lamp.told(2)
        assert far is not None
        assert (near.tokens, far.tokens) == ([1], [2])


class TestHops:
    def test_two_clusters_away(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABC", ["AB", "BC"]) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("C", "fridge")
            fridge.memory.add([entry(fridge.who, 1, token=42)])
            world.reachable(lamp, 2)
            reply = lamp.told(1)
            assert reply is not None
            assert reply.tokens == [42]

    def test_a_device_that_allows_fewer_does_not_ask(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABC", ["AB", "BC"]) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("C", "fridge")
            fridge.memory.add([entry(fridge.who, 1)])
            world.reachable(lamp, 2)
            assert not lamp.network.around.reaches(SPACE, 1)
            lamp.network.resolver._options = AskOptions(hops=1)
            assert lamp.ask(1) is None

    def test_the_edges_own_limit_holds_whatever_is_asked_for(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABC", ["AB", "BC"], BridgeLimits(hops=1)) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("C", "fridge")
            fridge.memory.add([entry(fridge.who, 1)])
            near = world.device("B", "door")
            world.reachable(lamp, 1)
            eventually(lambda: lamp.network.around.knows(near.who.public))
            assert not lamp.network.around.knows(fridge.who.public)
            lamp.transport.publish(Cluster("home", "A").path(ASK, "lamp", "edge"), encode(question(hops=4)))
            eventually(lambda: bool(world.topics("A", "edge/memory/answer/lamp")))
            assert world.topics("B", "/memory/ask/")
            assert not world.topics("C", "/memory/ask/")

    def test_nobody_is_asked_where_the_space_is_not(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABC", ["AB", "AC"]) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("C", "fridge")
            fridge.memory.add([entry(fridge.who, 1)])
            world.reachable(lamp)
            assert lamp.told(1) is not None
            assert not world.topics("B", "/memory/ask/")


class TestRings:
    def test_three_edges_do_not_multiply_a_question(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABC", RING, BridgeLimits(hops=4)) as world:
            lamp, fridge, door = world.device("A", "lamp"), world.device("B", "fridge"), world.device("C", "door")
            world.reachable(lamp)
            for origin in (fridge.who.public, door.who.public):
                eventually(lambda origin=origin: lamp.network.around.knows(origin))  # type: ignore[misc]
            lamp.network.resolver._options = AskOptions(hops=4, cap=60.0)
            assert lamp.told(1) is None
            world.settle()
            asked = [topic for cluster in "ABC" for topic in world.topics(cluster, "/memory/ask/")]
            assert sorted(asked) == [
                "skerry/1/home/A/lamp/memory/ask/edge",
                "skerry/1/home/B/edge.A/memory/ask/edge",
                "skerry/1/home/B/edge/memory/ask/fridge",
                "skerry/1/home/C/edge.A/memory/ask/edge",
                "skerry/1/home/C/edge/memory/ask/door",
            ]

    def test_four_in_a_square_ask_the_far_corner_once(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABCD", ["AB", "BC", "CD", "DA"], BridgeLimits(hops=4)) as world:
            lamp = world.device("A", "lamp")
            world.device("C", "fridge")
            world.reachable(lamp)
            eventually(lambda: {"B", "D"} == set(world.edges["A"].listing.routes(SPACE, 1, ["A"])))
            assert lamp.told(1) is None
            world.settle()
            assert len(world.topics("C", "/memory/ask/fridge")) == 1
            assert world.edges["C"].bridge.counts["repeated"] == 1

    def test_an_edge_that_sends_a_question_back_is_answered_and_no_more(self, tmp_path: Path) -> None:
        with World(tmp_path, "AB", ["AB"]) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("B", "fridge")
            world.reachable(lamp)
            eventually(lambda: fridge.network.around.reaches(SPACE, 1))
            there = world.edges["B"].neighbours["A"]
            ask = encode(question(hops=4))
            for _ in range(10):
                there.publish(Cluster("home", "A").path(ASK, "edge.B", "edge"), ask)
            eventually(lambda: world.edges["A"].bridge.counts["repeated"] == 9)
            eventually(lambda: len(world.topics("A", "edge/memory/answer/edge.B")) == 10)
            assert len(world.topics("A", "/memory/ask/lamp")) == 1
            assert len(world.topics("B", "/memory/ask/edge")) == 1


class TestOutages:
    def test_a_dead_neighbour_takes_nothing_with_it(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABC", ["AB", "AC"]) as world:
            lamp, fridge, door = world.device("A", "lamp"), world.device("B", "fridge"), world.device("C", "door")
            door.memory.add([entry(door.who, 1, token=42)])
            for origin in (fridge.who.public, door.who.public):
                eventually(lambda origin=origin: lamp.network.around.knows(origin))  # type: ignore[misc]
            world.buses["B"].stop()
            eventually(lambda: "B" not in world.edges["A"].listing.routes(SPACE, 1, []))
            reply = lamp.told(1)
            assert reply is not None
            assert reply.tokens == [42]
            world.buses["B"].start(persistence=False)
            fridge.memory.add([entry(fridge.who, 2, token=43)])
            eventually(lambda: "B" in world.edges["A"].listing.routes(SPACE, 1, []))
            eventually(lambda: fridge.network.transport.connected)  # its edge may be back first
            back = lamp.told(2)
            assert back is not None
            assert back.tokens == [43]

    def test_when_the_edge_dies_nobody_waits_for_it(self, tmp_path: Path) -> None:
        with World(tmp_path, "AB", ["AB"]) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("B", "fridge")
            fridge.memory.add([entry(fridge.who, 1)])
            world.reachable(lamp)
            world.buses["A"].cut("edge")
            eventually(lambda: not lamp.network.around.reaches(SPACE, 4))
            assert lamp.ask(1) is None
            world.buses["A"].restore("edge")
            world.reachable(lamp)
            assert lamp.told(1) is not None

    def test_a_broker_that_forgets_everything_is_told_again(self, tmp_path: Path) -> None:
        with World(tmp_path, "AB", ["AB"]) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("B", "fridge")
            fridge.memory.add([entry(fridge.who, 1)])
            world.reachable(lamp)
            world.buses["A"].stop()
            world.buses["A"].start(persistence=False)
            lamp.network.around._nearest = {}
            world.reachable(lamp)
            assert lamp.told(1) is not None

    def test_a_neighbour_that_hears_and_never_answers(self, tmp_path: Path) -> None:
        with World(tmp_path, "ABC", ["AB", "AC"]) as world:
            lamp, fridge, door = world.device("A", "lamp"), world.device("B", "fridge"), world.device("C", "door")
            for origin in (fridge.who.public, door.who.public):
                eventually(lambda origin=origin: lamp.network.around.knows(origin))  # type: ignore[misc]
            world.buses["B"].fault = lambda client, d: [] if "/memory/ask/" in d.topic else [d]
            door.memory.add([entry(door.who, 1, token=42)])
            reply = lamp.told(1)
            assert reply is not None
            assert reply.tokens == [42]


class TestHostile:
    def test_forged_entries_are_not_passed_on(self, tmp_path: Path) -> None:
        with World(tmp_path, "AB", ["AB"]) as world:
            lamp, fridge = world.device("A", "lamp"), world.device("B", "fridge")
            world.reachable(lamp)
            forged = [msgspec.structs.replace(entry(fridge.who, 1), token=8), entry(someone(99), 1)]
            world.buses["B"].fault = lambda client, d: (
                [d._replace(payload=encode(Answer(7, forged)))] if d.topic.endswith("/memory/answer/edge.A") else [d]
            )
            lamp.transport.publish(Cluster("home", "A").path(ASK, "lamp", "edge"), encode(question(hops=1)))
            eventually(lambda: bool(world.topics("A", "edge/memory/answer/lamp")))
            answers = [d.payload for d in world.wire["A"] if d.topic.endswith("edge/memory/answer/lamp")]
            assert answers == [encode(Answer(7, []))]
            assert world.edges["A"].bridge.counts["bad_entry"] == 2

    def test_a_flood_is_cut_off(self, tmp_path: Path) -> None:
        limits = BridgeLimits(device_rate=0.0, device_burst=10, rate=0.0, burst=12)
        with World(tmp_path, "AB", ["AB"], limits) as world:
            lamp, door = world.device("A", "lamp"), world.device("A", "door")
            world.device("B", "fridge")
            world.reachable(lamp)
            for first, device in ((0, lamp), (100, door)):
                topic = Cluster("home", "A").path(ASK, device.name, "edge")
                for id in range(first, first + 50):
                    device.transport.publish(topic, encode(question(id=id)))
            eventually(lambda: world.edges["A"].bridge.counts["flood"] == 88)
            world.settle()
            assert len(world.topics("B", "edge.A/memory/ask/edge")) == 12

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
    @given(payload=st.binary(max_size=200), sender=st.sampled_from(["lamp", "edge", "edge.B", "a/b", ""]))
    def test_rubbish_is_counted_and_nothing_else(self, edge: Edge, payload: bytes, sender: str) -> None:
        home = Cluster("home", "A")
        bridge, counts = edge.bridge, edge.bridge.counts
        before = sum(counts[name] for name in ("malformed", "version", "flood"))
        bridge.asked(Delivery(home.path(ASK, sender, "edge"), payload, False))
        bridge.answered("A", Delivery(home.path(ANSWER, sender, "edge"), payload, False))
        edge.listing.heard("B", Delivery("skerry/1/home/B/edge/directory", payload, True))
        edge.roster.take(Delivery(f"skerry/1/home/A/{sender}/status", payload, True))
        assert sum(counts[name] for name in ("malformed", "version", "flood")) == before + 2
        assert not bridge._open

    def test_what_is_remembered_is_bounded(self, edge: Edge) -> None:
        bridge = edge.bridge
        bridge._all = bridge._devices = _Unlimited()  # type: ignore[assignment]
        for id in range(10_000):
            bridge.asked(Delivery("skerry/1/home/A/lamp/memory/ask/edge", encode(question(id=id)), False))
        assert len(bridge._seen) == 8192
        assert len(bridge._open) <= 1024


class _Unlimited:
    def take(self, *_: object) -> bool:
        return True


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    """Not started."""
    world = World(tmp_path, "AB", [])
    world.stack.close()
    home, away = (BusTransport(world.buses[name], name) for name in "AB")
    return Edge(Cluster("home", "A"), home, {"B": away})


def test_a_cluster_is_no_neighbour_of_itself(edge: Edge) -> None:
    with pytest.raises(ConfigError, match="neighbour of itself"):
        Edge(Cluster("home", "A"), edge.home, {"A": edge.neighbours["B"]})
