"""The outbox over a transport that does as the test says, and over the bus."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.link import outbox as module
from agent.link.outbox import Outbox
from protocol.errors import StoreError
from protocol.transport.base import Handler, Transport
from protocol.transport.bus import Bus, BusTransport
from tests.protocol.transport.worlds import Inbox, wait_until

ROW = 64  # bytes of a row beside topic and payload


class Scripted(Transport):
    """Keeps what is published; the test acknowledges."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.published: list[tuple[str, bytes, bool]] = []
        self.dones: list[Callable[[], None]] = []
        self.changed = threading.Condition()

    @property
    def connected(self) -> bool:
        return self.on

    @property
    def state(self) -> str:
        return "connected" if self.on else "connecting"

    def start(self) -> None: ...

    def subscribe(self, filter: str, handler: Handler, *, qos: int = 0) -> None: ...

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, done: Callable[[], None] | None = None
    ) -> bool:
        with self.changed:
            assert qos == 1
            assert done is not None
            if self.on:
                self.published.append((topic, payload, retain))
                self.dones.append(done)
                self.changed.notify_all()
            return self.on

    def close(self) -> None: ...

    def wait(self, count: int) -> list[bytes]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.published) >= count, 30), self.published
            return [payload for _, payload, _ in self.published]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[tuple[Outbox, Scripted]]:
    transport = Scripted()
    outbox = Outbox(folder / "outbox.db", transport, **settings)
    try:
        yield outbox, transport
    finally:
        outbox.close()


def come_up(outbox: Outbox, transport: Scripted) -> None:
    transport.on = True
    outbox.up()


def go_down(outbox: Outbox, transport: Scripted) -> None:
    transport.on = False
    outbox.down()


def test_what_was_put_in_an_outage_is_sent_in_order_and_then_gone(tmp_path: Path) -> None:
    with opened(tmp_path) as (outbox, transport):
        for number in range(100):
            outbox.put("t", b"%d" % number, retain=number == 7)
        assert outbox.flush_to_disk()
        come_up(outbox, transport)
        for number in range(100):
            assert transport.wait(number + 1)[number] == b"%d" % number
            transport.dones[number]()
        assert [retain for _, _, retain in transport.published].index(True) == 7
        wait_until(lambda: outbox.waiting == 0)
        assert outbox.sent == 100
    with opened(tmp_path) as (outbox, _):
        assert outbox.waiting == 0


def test_what_was_not_acknowledged_is_sent_again_in_order(tmp_path: Path) -> None:
    with opened(tmp_path) as (outbox, transport):
        come_up(outbox, transport)
        for number in range(10):
            outbox.put("t", b"%d" % number)
        transport.wait(10)
        for number in (0, 1, 5):
            transport.dones[number]()
        go_down(outbox, transport)
        outbox.put("t", b"new")
        come_up(outbox, transport)
        assert transport.wait(18)[10:] == [b"2", b"3", b"4", b"6", b"7", b"8", b"9", b"new"]


def test_it_survives_being_closed_and_opened(tmp_path: Path) -> None:
    with opened(tmp_path) as (outbox, _):
        outbox.put("t/1", b"a", retain=True)
        outbox.put("t/2", b"b")
    with opened(tmp_path) as (outbox, transport):
        assert outbox.waiting == 2
        outbox.put("t/1", b"c")
        come_up(outbox, transport)
        transport.wait(3)
        assert transport.published == [("t/1", b"a", True), ("t/2", b"b", False), ("t/1", b"c", False)]


def test_each_write_reaches_the_disk_itself(tmp_path: Path) -> None:
    """What `kill -9` can't show: SQLite's full synchronous mode, in which a commit survives a power cut."""
    with opened(tmp_path) as (outbox, _):
        assert outbox._file._db.execute("pragma synchronous").fetchone() == (2,)
        assert outbox._file._db.execute("pragma journal_mode").fetchone() == ("wal",)


def test_no_more_than_a_window_is_under_way(tmp_path: Path) -> None:
    with opened(tmp_path) as (outbox, transport):
        for number in range(200):
            outbox.put("t", b"%d" % number)
        come_up(outbox, transport)
        transport.wait(64)
        transport.dones[0]()
        transport.wait(65)
        assert len(transport.published) == 65


def test_a_full_box_drops_the_lowest_priority_first_and_of_one_the_oldest(tmp_path: Path) -> None:
    size = len("t") + 100 + ROW
    with opened(tmp_path, max_bytes=5 * size) as (outbox, transport):
        for name, priority in (("a", 1), ("b", 0), ("c", 2), ("d", 0), ("e", 1), ("f", 1), ("g", 0), ("h", 2)):
            outbox.put("t", name.encode().ljust(100), priority)
        assert outbox.flush_to_disk()
        assert outbox.dropped_full == 3
        outbox.put("t", b"i".ljust(100), 3)
        outbox.put("t", b"x" * (5 * size))
        assert outbox.flush_to_disk()
        assert outbox.dropped_full == 5
        come_up(outbox, transport)
        assert b"".join(transport.wait(5)).split() == [b"c", b"e", b"f", b"h", b"i"]


def test_age_is_running_time(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, max_age=100.0, clock=clock) as (outbox, _):
        outbox.put("t", b"old")
        assert outbox.flush_to_disk()
        clock.now += 60
        outbox.put("t", b"young")
        assert outbox.flush_to_disk()
    clock.now = 5.0  # switched off for months, and the machine's clock began anew
    with opened(tmp_path, max_age=100.0, clock=clock) as (outbox, _):
        outbox.put("t", b"younger")
        assert outbox.flush_to_disk()
        assert outbox.dropped_old == 0
        clock.now += 50
        outbox.put("t", b"new")
        assert outbox.flush_to_disk()
        assert outbox.dropped_old == 1
        assert outbox.waiting == 3


def full(outbox: Outbox) -> None:
    """From now on SQLite meets a full disk."""
    db = outbox._file._db
    (pages,) = db.execute("pragma page_count").fetchone()
    db.execute(f"pragma max_page_count = {pages}")


def room(outbox: Outbox) -> None:
    outbox._file._db.execute("pragma max_page_count = 1000000")


def test_on_a_full_disk_the_newest_wait_in_memory_and_are_sent_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DISK_SECONDS", 0.05)
    size = len("t") + 5000 + ROW
    with opened(tmp_path, max_ram=4 * size) as (outbox, transport):
        outbox.put("t", b"saved")
        assert outbox.flush_to_disk()
        full(outbox)
        for number in range(7):
            outbox.put("t", (b"%d" % number).ljust(5000), priority=1 if number == 2 else 0)
        assert not outbox.flush_to_disk()
        wait_until(lambda: outbox.dropped_full == 3)
        come_up(outbox, transport)
        sent = [payload.strip() for payload in transport.wait(5)]
        assert sent == [b"saved", b"2", b"4", b"5", b"6"]
        transport.dones[1]()
        room(outbox)
        wait_until(outbox.flush_to_disk)
        assert outbox.disk_errors
    with opened(tmp_path) as (outbox, transport):
        come_up(outbox, transport)
        assert [payload.strip() for payload in transport.wait(4)] == [b"saved", b"4", b"5", b"6"]


def test_put_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, max_ram=100_000) as (outbox, _):
        stuck, free = threading.Event(), threading.Event()
        write = outbox._file.write

        def slow(*arguments: Any) -> tuple[int, int]:
            stuck.set()
            assert free.wait(30)
            return write(*arguments)

        monkeypatch.setattr(outbox._file, "write", slow)
        outbox.put("t", b"first")
        assert stuck.wait(30)
        for _ in range(10_000):
            outbox.put("t", b"x" * 100)
        assert outbox.dropped_full > 5000  # memory stays bounded
        assert not outbox.flush_to_disk(timeout=0.0)
        free.set()
        assert outbox.flush_to_disk()


def test_a_broker_that_acknowledges_nothing_is_sent_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with opened(tmp_path, clock=clock) as (outbox, transport):
        come_up(outbox, transport)
        outbox.put("t", b"1")
        transport.wait(1)
        clock.now += 61.0
        outbox.put("t", b"2")
        assert transport.wait(3) in ([b"1", b"2", b"1", b"2"], [b"1", b"1", b"2"])


def test_a_damaged_file_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "outbox.db").write_bytes(b"not a database" * 1000)
    with opened(tmp_path) as (outbox, _):
        outbox.put("t", b"x")
        assert outbox.flush_to_disk()
    assert (tmp_path / "outbox.db.damaged").read_bytes().startswith(b"not a database")


def test_one_process_has_it(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(StoreError, match="in use"):
            Outbox(tmp_path / "outbox.db", Scripted())
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        Outbox(tmp_path / "file" / "outbox.db", Scripted())


def test_an_outage_without_end_does_not_fill_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=1 << 20, max_ram=64 << 10) as (outbox, _):
        for _ in range(200):
            for _ in range(50):
                outbox.put("t", b"x" * 1000)
            assert outbox.flush_to_disk()
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6 << 20
        assert outbox.dropped_full == 10_000 - outbox.waiting
    with sqlite3.connect(tmp_path / "outbox.db") as db:
        assert 1 << 19 < db.execute("select sum(size) from letters").fetchone()[0] <= 1 << 20


def test_over_the_bus_nothing_is_lost_by_outages(tmp_path: Path) -> None:
    bus = Bus()
    reader, inbox = BusTransport(bus, "reader"), Inbox()
    reader.subscribe("t/+", inbox, qos=1)
    reader.start()
    transport = BusTransport(bus, "device")
    outbox = Outbox(tmp_path / "outbox.db", transport)
    transport.on_up, transport.on_down = outbox.up, outbox.down
    transport.start()
    for number in range(300):
        outbox.put(f"t/{number % 3}", b"%d" % number)
        if number % 50 == 10:
            bus.cut("device")
        if number % 50 == 30:
            bus.restore("device")
    wait_until(lambda: outbox.waiting == 0)
    for topic in range(3):
        got = [int(delivery.payload) for delivery in inbox.got if delivery.topic == f"t/{topic}"]
        assert list(dict.fromkeys(got)) == list(range(topic, 300, 3))
    outbox.close()
    transport.close()
    bus.close()
