"""Gossip: batched, bounded, and never in the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from agent.peers.sharing import Gossip, GossipLimits, Sharing
from protocol.errors import StoreError
from protocol.memory import MAX_KEY_BYTES, Entry, check_entry, sign_entry
from protocol.peers import decode_news
from tests.agent.peers.devices import eventually
from tests.protocol.entries import SPACE, TAIL, entry, someone

ME = someone(1)


class Clock:
    """Stands still until it is told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Box:
    """An outbox that shows what was put in."""

    def __init__(self) -> None:
        self.batches: list[list[Entry]] = []
        self.bytes = 0
        self.broken = False

    def put(self, topic: str, payload: bytes, priority: int) -> None:
        if self.broken:
            raise StoreError("the disk is full")
        news = decode_news(payload)
        assert news is not None
        self.batches.append(news.entries)
        self.bytes += len(payload)

    @property
    def entries(self) -> list[Entry]:
        return [entry for batch in self.batches for entry in batch]


class Station:
    def __init__(self, limits: GossipLimits, sharing: Sharing | None = None) -> None:
        self.clock = Clock()
        self.box = Box()
        self.wanted = True
        sharing = sharing or Sharing()
        self.gossip = Gossip("topic", self.box, ME.sign, sharing, lambda space: self.wanted, self.clock, limits)

    def share(self, *numbers: int) -> None:
        for number in numbers:
            self.gossip.share(entry(ME, number, signed=False))


@pytest.fixture
def station() -> Iterator[Station]:
    made = Station(GossipLimits(batch=4, pause=0.01))
    yield made
    made.gossip.close()


def test_entries_are_signed_and_batched_in_order(station: Station) -> None:
    station.share(*range(10))
    eventually(lambda: len(station.box.entries) == 10)
    assert [one.key for one in station.box.entries] == [entry(ME, number).key for number in range(10)]
    assert all(check_entry(one) is None for one in station.box.entries)
    assert max(map(len, station.box.batches)) <= 4
    assert station.gossip.sent == 10


def test_a_single_entry_does_not_wait_for_company(station: Station) -> None:
    station.share(1)
    eventually(lambda: station.box.batches == [[entry(ME, 1)]])


def test_what_nobody_wants_or_may_see_is_not_even_queued(station: Station) -> None:
    station.gossip.share(entry(ME, 1), private=True)
    station.wanted = False
    station.share(2)
    station.gossip.close()
    assert station.box.batches == []
    for sharing in (Sharing(enabled=False), Sharing(unshared=frozenset([SPACE]))):
        quiet = Station(GossipLimits(), sharing)
        quiet.share(3)
        quiet.gossip.close()
        assert quiet.box.batches == []


def test_no_more_goes_out_per_second_and_hour_than_allowed() -> None:
    station = Station(GossipLimits(batch=16, pause=0.0, per_second=9_000, per_hour=20_000))
    station.share(*range(300))
    eventually(lambda: station.gossip.sent > 0)
    station.gossip.close()
    assert station.box.bytes <= 9_000
    assert station.gossip.sent + station.gossip.dropped == 300
    assert station.gossip.dropped > 200


def test_the_rate_is_taken_up_again_with_time() -> None:
    limits = GossipLimits(batch=16, pause=0.0, per_second=9_000, per_hour=1 << 30)
    station = Station(limits)
    station.share(*range(100))
    while station.gossip.sent < 100:
        before = station.gossip.sent
        station.clock.now += 1.0
        eventually(lambda before=before: station.gossip.sent > before)  # type: ignore[misc]
    assert station.clock.now >= 2.0  # 100 entries of 232 bytes, reckoned
    station.gossip.close()
    assert station.gossip.dropped == 0


def test_beyond_what_may_wait_the_oldest_goes_first() -> None:
    station = Station(GossipLimits(batch=10**6, pause=60.0, waiting=10))  # nothing is due yet
    station.share(*range(25))
    assert station.gossip.dropped == 15
    assert [one.key for one in station.gossip._waiting] == [entry(ME, number).key for number in range(15, 25)]
    station.gossip.close()
    assert [one.key for one in station.box.entries] == [entry(ME, number).key for number in range(15, 25)]


def test_a_disk_that_refuses_stops_nothing(station: Station) -> None:
    station.box.broken = True
    station.share(1)
    eventually(lambda: station.gossip.dropped == 1)
    station.box.broken = False
    station.share(2)
    eventually(lambda: station.box.batches == [[entry(ME, 2)]])


def test_what_nobody_would_accept_is_not_sent(station: Station) -> None:
    absurd = Entry(SPACE, b"key", TAIL, 1, 0.5, 10**6, 0, ME.public)
    station.gossip.share(absurd)
    station.share(2)
    eventually(lambda: station.box.batches == [[entry(ME, 2)]])
    assert station.gossip.dropped == 1


def test_the_largest_key_still_fits_through_the_smallest_limit() -> None:
    station = Station(GossipLimits(pause=0.0, per_second=1, per_hour=1))
    large = sign_entry(Entry(SPACE, b"k" * MAX_KEY_BYTES, TAIL, 1, 0.5, 1, 0, ME.public), ME.sign)
    station.gossip.share(large)
    eventually(lambda: station.box.entries == [large])
    station.gossip.close()


def test_sharing_from_many_threads_loses_nothing() -> None:
    station = Station(GossipLimits(batch=16, pause=0.0, per_second=1 << 20))
    threads = [threading.Thread(target=station.share, args=range(n * 50, n * 50 + 50)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: station.gossip.sent == 400)
    station.gossip.close()
    assert {one.key for one in station.box.entries} == {entry(ME, number).key for number in range(400)}
