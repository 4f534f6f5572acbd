"""The coordinator at real brokers, with and without a bridge between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.rounds import Overall
from protocol.topics import COORDINATOR, EDGE
from protocol.transport.mqtt import MqttOptions, MqttTransport
from server.broker.access import set_password
from server.coordinator.align import AlignOptions
from server.coordinator.service import Coordinator, Link
from server.coordinator.store import StateFile
from tests.brokers import Embedded, Mosquitto
from tests.server.coordinator.fleet import FLEET, Edge, mqtt, report


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def edge(stack: ExitStack, url: str, cluster: str) -> Edge:
    made = Edge(mqtt(url, f"edge-{cluster}"), cluster)
    stack.callback(made.transport.close)
    return made


def coordinator(stack: ExitStack, folder: Path, places: dict[str, str]) -> Callable[[], None]:
    """Started; `places`: clusters by the URL of their broker. Returns what ends it."""
    links = [Link(mqtt(url, "coordinator"), list(names)) for url, names in places.items()]
    made = Coordinator(FLEET, links, StateFile(folder), AlignOptions(), pause=0.05, silence=1e6)
    made.start()
    ending = ExitStack()
    ending.callback(made.close)
    stack.push(ending)
    return ending.close


def increasing(edge: Edge) -> bool:
    return edge.numbers == sorted(edge.numbers)


def test_clusters_at_brokers_of_their_own_through_outages(stack: ExitStack, tmp_path: Path) -> None:
    one, other = (stack.enter_context(Mosquitto(tmp_path / name)) for name in "ab")
    a, b = edge(stack, one.url, "A"), edge(stack, other.url, "B")
    a.tell(report(1, 0.2))
    b.tell(report(1, 0.4))
    close = coordinator(stack, tmp_path / "state", {one.url: "A", other.url: "B"})
    assert a.wait(0.3) == b.wait(0.3)

    other.kill()
    a.tell(report(2, 0.5))
    a.wait(0.45)  # of B's last report it makes use as before
    other.restart(persistence=False)
    b.wait(0.45)
    b.tell(report(2, 0.3))
    assert a.wait(0.4) == b.wait(0.4)

    close()
    a.tell(report(3, 0.3))  # nobody is there
    late = Edge(mqtt(one.url, "late"), "A")
    stack.callback(late.transport.close)
    late.wait(0.4)  # what was told stays
    coordinator(stack, tmp_path / "state", {one.url: "A", other.url: "B"})
    assert a.wait(0.3) == b.wait(0.3)
    assert increasing(a)
    assert increasing(b)


@pytest.mark.parametrize("kind", [Mosquitto, Embedded])
def test_several_clusters_at_one_broker(
    stack: ExitStack, tmp_path: Path, kind: type[Mosquitto] | type[Embedded]
) -> None:
    broker = stack.enter_context(kind(tmp_path / "broker"))
    edges = {name: edge(stack, broker.url, name) for name in "ABC"}
    coordinator(stack, tmp_path / "state", {broker.url: "ABC"})
    for name, threshold in {"A": 0.2, "B": 0.3, "C": 0.4}.items():
        edges[name].tell(report(1, threshold))
    heard: set[Overall] = {edges[name].wait(0.3).number for name in "ABC"}  # type: ignore[misc]
    assert len(heard) == 1


def test_the_brokers_access_list_lets_it_do_what_it_does(stack: ExitStack, tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    for user in (EDGE, COORDINATOR):
        set_password(passwords, user, "secret")
    broker = stack.enter_context(Embedded(tmp_path / "broker", ["--passwords", str(passwords)]))

    def known(user: str) -> MqttTransport:
        return MqttTransport(MqttOptions(broker.url, user, user, "secret", first_retry=0.02, longest_retry=0.1))

    a = Edge(known(EDGE), "A")
    stack.callback(a.transport.close)
    file = StateFile(tmp_path / "state")
    service = Coordinator(FLEET, [Link(known(COORDINATOR), "A")], file, AlignOptions(), pause=0.05, silence=1e6)
    service.start()
    stack.callback(service.close)
    a.tell(report(1, 0.2))
    a.wait(0.2)
    assert service.links[0].transport.subscriptions_refused == 0


def test_a_cluster_behind_a_bridge(stack: ExitStack, tmp_path: Path) -> None:
    """B's broker opens a connection to A's, the only one that the coordinator knows."""
    centre = stack.enter_context(Mosquitto(tmp_path / "centre"))
    bridge = (
        "allow_anonymous true",
        "connection centre",
        f"address 127.0.0.1:{centre.port}",
        "restart_timeout 1",
        f"topic skerry/1/{FLEET}/B/edge/report out 1",
        f"topic skerry/1/{FLEET}/B/coordinator/overall in 1",
    )
    behind = stack.enter_context(Mosquitto(tmp_path / "behind", bridge))
    a, b = edge(stack, centre.url, "A"), edge(stack, behind.url, "B")
    a.tell(report(1, 0.2))
    b.tell(report(1, 0.4))
    coordinator(stack, tmp_path / "state", {centre.url: "AB"})
    a.wait(0.3)
    b.wait(0.3)
    behind.stop()
    a.tell(report(2, 0.5))
    a.wait(0.45)
    behind.restart(persistence=True)
    b.wait(0.45)
    assert increasing(b)
