"""The device's part in a round, on a bus that is cut, doubled and lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from agent.learn.federation import PAST, Past, RoundOptions
from agent.learn.goals import Fixed
from agent.learn.ledger_store import LedgerValues
from agent.learn.noise import spent
from protocol.errors import StoreError
from protocol.rounds import encode
from protocol.topics import AGREED, CALL, EDGE
from protocol.transport.bus import Bus
from tests.agent.learn.devices import CLUSTER, Device, EdgeFake, escalate
from tests.protocol.transport.worlds import wait_until as wait


@pytest.fixture
def bus() -> Iterator[Bus]:
    bus = Bus()
    yield bus
    bus.close()


@pytest.fixture
def edge(bus: Bus) -> EdgeFake:
    return EdgeFake(bus)


@pytest.fixture
def start(bus: Bus, tmp_path: Path) -> Iterator[Callable[..., Device]]:
    devices: list[Device] = []

    def started(**options: object) -> Device:
        for device in devices:
            device.close()
        devices[:] = [Device(bus, tmp_path, **options)]  # type: ignore[arg-type]
        return devices[0]

    yield started
    for device in devices:
        device.close()


def test_a_call_is_answered_with_what_was_learned(edge: EdgeFake, start: Callable[..., Device]) -> None:
    device = start()
    escalate(device.learner, 2000)
    edge.call(1)
    wait(lambda: device.federation.answered == 1)
    [update] = edge.updates
    assert update.round == 1
    assert update.subject == device.learner.subject
    assert update.threshold == pytest.approx(0.3, abs=0.03)
    assert update.evidence > 50
    assert update.statistics is not None
    assert update.statistics[1] == pytest.approx(0.5, abs=0.05)


def test_each_round_once_also_after_a_restart(bus: Bus, edge: EdgeFake, start: Callable[..., Device]) -> None:
    device = start()
    escalate(device.learner, 500)
    edge.call(7)
    wait(lambda: device.federation.answered == 7)
    again = start()  # and hears the retained call
    edge.call(7)
    edge.call(8)
    wait(lambda: again.federation.answered == 8)
    assert [update.round for update in edge.updates] == [7, 8]


def test_an_edge_that_lost_its_numbers_is_told_once(bus: Bus, edge: EdgeFake, start: Callable[..., Device]) -> None:
    device = start()
    escalate(device.learner, 500)
    edge.call(40)
    wait(lambda: device.federation.answered == 40)
    for _ in range(3):
        edge.call(1)
        bus.settle()
    wait(lambda: len(edge.updates) == 2)
    edge.call(41)
    wait(lambda: device.federation.answered == 41)
    assert [update.round for update in edge.updates] == [40, 40, 41]


def test_a_device_that_was_away_takes_part_by_itself(edge: EdgeFake, start: Callable[..., Device]) -> None:
    for number in range(1, 40):
        edge.call(number)
    edge.agree(39, 0.6, "0" * 16)
    device = start()
    escalate(device.learner, 500)
    wait(lambda: device.federation.number == 39)
    if device.federation.counts["nothing_learned"]:  # it heard the call before it had learned anything
        edge.call(40)
    wait(lambda: device.federation.answered >= 39)
    assert edge.updates[-1].base == 39


def test_what_the_broker_did_not_acknowledge_is_sent_again_the_same(
    bus: Bus, edge: EdgeFake, start: Callable[..., Device]
) -> None:
    device = start(options=RoundOptions(noise=4.0))
    escalate(device.learner, 500)
    bus.settle()
    publish, lost = device.transport.publish, []

    def lose(*args: object, **options: object) -> bool:
        lost.append(args[1])
        return True

    device.transport.publish = lose  # type: ignore[method-assign,assignment]
    edge.call(1)
    wait(lambda: bool(lost))
    device.transport.publish = publish  # type: ignore[method-assign]
    bus.cut("barn")
    bus.restore("barn")
    wait(lambda: device.federation.answered == 1)
    assert [encode(update) for update in edge.updates] == lost, "new noise would give away more"


def test_it_answers_within_the_spread(edge: EdgeFake, start: Callable[..., Device], bus: Bus) -> None:
    now = [0.0]
    device = start(clock=lambda: now[0])
    escalate(device.learner, 500)
    edge.call(1, spread=20.0)
    bus.settle()
    assert not edge.updates
    now[0] = 10.1  # drawn: half of the spread
    edge.call(1, spread=20.0)  # heard again, and drawn anew
    bus.settle()
    assert not edge.updates
    now[0] = 20.2
    edge.call(1, spread=0.0)
    wait(lambda: device.federation.answered == 1)
    assert len({encode(update) for update in edge.updates}) == 1


def test_what_was_agreed_moves_the_threshold_and_survives_a_restart(
    edge: EdgeFake, start: Callable[..., Device]
) -> None:
    device = start()
    edge.agree(5, 0.6, device.learner.subject)
    wait(lambda: device.policy.threshold == pytest.approx(0.6))
    edge.agree(4, 0.1, device.learner.subject)
    edge.agree(6, 0.62, "f" * 16)  # of another subject
    wait(lambda: device.federation.number == 6)
    assert device.federation.counts["out_of_date"] == 1
    edge.agree(7, 0.7, device.learner.subject)
    wait(lambda: device.policy.threshold == pytest.approx(0.7))
    edge.bus.stop()
    assert start().policy.threshold == pytest.approx(0.7), "without a broker"


def test_own_evidence_outweighs_what_was_agreed(edge: EdgeFake, start: Callable[..., Device]) -> None:
    device = start()
    escalate(device.learner, 5000)
    edge.agree(1, 0.9, device.learner.subject)
    wait(lambda: device.federation.number == 1)
    device.learner.refresh()
    assert device.policy.threshold == pytest.approx(0.3, abs=0.12)


def test_who_has_learned_nothing_or_keeps_to_itself_is_silent(
    bus: Bus, edge: EdgeFake, start: Callable[..., Device]
) -> None:
    device = start()
    edge.call(1)
    wait(lambda: device.federation.counts["nothing_learned"] >= 1)
    device = start(goal=Fixed(0.5))
    escalate(device.learner, 500)
    edge.call(2)
    wait(lambda: device.federation.counts["nothing_learned"] >= 1)
    device = start(options=RoundOptions(secure=True))
    escalate(device.learner, 500)
    edge.call(3)
    wait(lambda: device.federation.counts["not_secure"] >= 1)
    bus.settle()
    assert not edge.updates


def test_noise_hides_and_is_counted_until_the_budget_is_spent(edge: EdgeFake, start: Callable[..., Device]) -> None:
    budget = spent(4.0, 2, 1e-5)
    options = RoundOptions(clip=0.01, noise=4.0, epsilon=budget + 1e-6)
    device = start(options=options)
    escalate(device.learner, 2000)
    edge.agree(1, 0.5, device.learner.subject)
    wait(lambda: device.federation.number == 1)
    edge.call(1)
    wait(lambda: device.federation.answered == 1)
    [update] = edge.updates
    # learned 0.3, agreed 0.5: clipped to 0.49, and a draw of one standard deviation added
    assert update.threshold == pytest.approx(0.53, abs=1e-5)
    assert update.statistics is None
    assert (update.evidence, update.clip, update.noise) == (1.0, 0.01, 4.0)
    device = start(options=options)
    edge.call(2)
    wait(lambda: device.federation.answered == 2)
    assert device.federation.spent == pytest.approx(budget)
    edge.call(3)
    wait(lambda: device.federation.counts["privacy_spent"] == 1)
    assert len(edge.updates) == 2


@pytest.mark.parametrize("payload", [b"", b"{", b'{"version":1,"round":-1}', b'{"version":9}', b"\xff" * 100])
def test_what_is_malformed_is_counted_and_changes_nothing(
    bus: Bus, edge: EdgeFake, start: Callable[..., Device], payload: bytes
) -> None:
    device = start()
    for kind in (CALL, AGREED):
        edge.transport.publish(CLUSTER.path(kind, EDGE), payload, qos=1)
    bus.settle()
    assert device.federation.counts["malformed"] + device.federation.counts["version"] == 2
    assert device.policy.threshold == 0.25
    assert device.transport.handler_errors == 0


def test_the_links_thread_does_not_wait_for_learning(bus: Bus, edge: EdgeFake, start: Callable[..., Device]) -> None:
    """Peers' answers come on it too, and are of use for 50 ms."""
    device = start()
    with device.learner._lock:  # it learns, or the disk is slow
        edge.agree(3, 0.6, device.learner.subject)
        bus.settle()
        assert device.federation.number == 0
    wait(lambda: device.federation.number == 3)
    assert device.policy.threshold == pytest.approx(0.6)


def test_a_disk_that_refuses_does_not_end_the_rounds(
    edge: EdgeFake, start: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = start()
    escalate(device.learner, 500)

    def refuse(name: str, value: bytes) -> None:
        raise StoreError("the ledger cannot be written: disk full")

    with monkeypatch.context() as broken:
        broken.setattr(device.ledger, "put", refuse)
        edge.call(1)
        wait(lambda: device.federation.answered == 1)
        edge.agree(1, 0.4, device.learner.subject)
        wait(lambda: device.federation.number == 1)
    edge.call(2)
    wait(lambda: device.federation.answered == 2)
    assert [update.round for update in edge.updates] == [1, 2]
    again = start()
    assert (again.federation.answered, again.federation.number) == (2, 1), "it was saved when the disk took it"


def test_noise_that_cannot_be_written_down_is_not_sent(
    bus: Bus, edge: EdgeFake, start: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = start(options=RoundOptions(noise=4.0))
    escalate(device.learner, 500)
    tried = threading.Event()

    def refuse(name: str, value: bytes) -> None:
        tried.set()
        raise StoreError("the ledger cannot be written: disk full")

    with monkeypatch.context() as broken:
        broken.setattr(device.ledger, "put", refuse)
        edge.call(1)
        assert tried.wait(30.0)
        device.federation.close()
    bus.settle()
    assert not edge.updates


def test_in_another_cluster_rounds_begin_anew_and_privacy_does_not(
    edge: EdgeFake, start: Callable[..., Device], tmp_path: Path
) -> None:
    with closing(LedgerValues(tmp_path / "barn.db")) as values:
        values.put(PAST, msgspec.json.encode(Past("home/other", answered=40, number=50, leaked=2 / 16)))
    device = start(options=RoundOptions(noise=4.0))
    assert device.federation.spent == pytest.approx(spent(4.0, 2, 1e-5))
    escalate(device.learner, 500)
    edge.agree(1, 0.6, device.learner.subject)
    edge.call(1)
    wait(lambda: device.federation.answered == 1)
    assert device.federation.number == 1
    assert [update.round for update in edge.updates] == [1]
    assert device.federation.spent == pytest.approx(spent(4.0, 3, 1e-5))


def test_more_noise_from_now_on_does_not_take_back_what_was_told(edge: EdgeFake, start: Callable[..., Device]) -> None:
    device = start(options=RoundOptions(noise=2.0))
    escalate(device.learner, 500)
    edge.call(1)
    wait(lambda: device.federation.answered == 1)
    device = start(options=RoundOptions(noise=100.0, epsilon=1.0))
    assert device.federation.spent == pytest.approx(spent(2.0, 1, 1e-5))
    edge.call(2)
    wait(lambda: device.federation.counts["privacy_spent"] == 1)
    assert len(edge.updates) == 1
