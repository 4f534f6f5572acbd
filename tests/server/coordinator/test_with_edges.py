"""The coordinator with real edges, over several rounds: what devices of one kind learn reaches their like elsewhere."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.rounds import Agreed, Update, Whole, decode_agreed, decode_call, encode, nearest
from protocol.topics import AGREED, CALL, COORDINATOR, EDGE, UPDATE, Cluster
from protocol.transport.base import Delivery
from protocol.transport.bus import Bus, BusTransport
from server.coordinator.align import AlignOptions
from server.coordinator.service import Coordinator, Link
from server.coordinator.store import StateFile
from server.edge.overview import order
from server.edge.round_store import RoundStore
from server.edge.rounds import RoundOptions, Rounds
from tests.server.coordinator.fleet import FLEET, KINDS, PATIENCE, SUBJECT, statistics

THRESHOLDS = (0.2, 0.4, 0.6)  # by kind
DEVICES = 24


class Site:
    """A cluster: its edge, and devices of three kinds, which answer every call."""

    def __init__(self, folder: Path, stack: ExitStack, name: str, seed: int) -> None:
        self.place, self.bus, self.folder = Cluster(FLEET, name), Bus(), folder / name
        stack.callback(self.bus.close)
        self.statistics, self.kinds = statistics(DEVICES, seed)
        self._agreed: Agreed | None = None
        self._changed = threading.Condition()
        self._crowd = BusTransport(self.bus, "devices")
        self._crowd.subscribe(self.place.path(CALL, EDGE), self._called, qos=1)
        self._crowd.subscribe(self.place.path(AGREED, EDGE), self._told, qos=1)
        self._crowd.start()
        options = RoundOptions(every=1e6, collect=8e4, spread=0.0, devices=DEVICES, settle=0.05)
        home = BusTransport(self.bus, EDGE)
        rounds = Rounds(self.place, home, RoundStore(self.folder), options)
        home.on_up, home.on_down = rounds.up, rounds.down
        rounds.start()
        home.start()
        stack.callback(rounds.close)

    def _called(self, delivery: Delivery) -> None:
        call = decode_call(delivery.payload)
        assert call is not None
        base = self._agreed.number if self._agreed else 0
        for at, (kind, told) in enumerate(zip(self.kinds, self.statistics, strict=True)):
            update = Update(call.round, base, SUBJECT, THRESHOLDS[kind], 10.0, told)
            self._crowd.publish(self.place.path(UPDATE, f"device-{at}"), encode(update), qos=1)

    def _told(self, delivery: Delivery) -> None:
        with self._changed:
            self._agreed = decode_agreed(delivery.payload)
            self._changed.notify_all()

    def round(self) -> None:
        order(self.folder, "round")

    def wait(self, evidence: bool) -> Whole:
        """Until the devices have heard of groups, with or without evidence."""

        def there() -> bool:
            whole = self.whole()
            return (
                whole is not None and len(whole.groups) == 3 and all(bool(g.evidence) == evidence for g in whole.groups)
            )

        with self._changed:
            assert self._changed.wait_for(there, PATIENCE), self._agreed
            whole = self.whole()
            assert whole is not None
            return whole

    def whole(self) -> Whole | None:
        return self._agreed.subjects[SUBJECT].overall if self._agreed and SUBJECT in self._agreed.subjects else None


def test_devices_of_one_kind_share_what_they_learned_across_clusters(tmp_path: Path) -> None:
    with ExitStack() as stack:
        sites = [Site(tmp_path, stack, name, seed) for seed, name in enumerate("AB")]
        links = [Link(BusTransport(site.bus, COORDINATOR), site.place.name) for site in sites]
        options = AlignOptions(similarity=True)
        file = StateFile(tmp_path / "state")
        coordinator = Coordinator(FLEET, links, file, options, pause=0.05, silence=1e6)
        stack.callback(coordinator.close)
        coordinator.start()
        for site in sites:
            site.wait(evidence=False)
        for site in sites:
            site.round()
        for site in sites:
            whole = site.wait(evidence=True)
            assert whole.level.devices == 2 * DEVICES
            assert whole.level.threshold == pytest.approx(0.4)
            for kind, threshold in enumerate(THRESHOLDS):
                place = nearest(KINDS[kind].tolist(), whole)
                assert place is not None
                assert whole.groups[place].threshold == pytest.approx(threshold)
                assert whole.groups[place].devices in (DEVICES // 3, 2 * DEVICES // 3)
