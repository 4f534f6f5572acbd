"""What comes in: only what is genuine, wanted and sensible is kept, and everything else is counted."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agent.memory.memory import EntryMemory
from agent.peers.intake import Intake, IntakeLimits, Verdict
from agent.peers.trust import Trust
from protocol.memory import Entry, sign_entry
from protocol.peers import News, encode
from protocol.topics import NEWS, Cluster
from protocol.transport.base import Delivery
from tests.protocol.entries import SPACE, WIDTH, entry, someone

A = Cluster("home", "A")
ME, LAMP, FRIDGE, STRANGER = (someone(number) for number in range(1, 5))


def usable(entry: Entry) -> bool:
    return len(entry.key) == WIDTH and entry.token < 100


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Phonebook:
    """Who announced which key."""

    def __init__(self, **devices: bytes) -> None:
        self.devices = devices

    def key_of(self, device: str) -> bytes | None:
        return self.devices.get(device)

    def knows(self, origin: bytes) -> bool:
        return origin in self.devices.values()


class Door:
    """An intake and what is around it."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.clock = Clock()
        self.memory = EntryMemory(folder)
        self.book = Phonebook(lamp=LAMP.public, fridge=FRIDGE.public)
        self.trust = Trust(ME.public, bound=0.1, base=0.05, records=self.memory)
        self.intake = Intake(
            A,
            "me",
            self.memory,
            self.book,
            self.trust,
            frozenset([SPACE]),
            usable,
            self.clock,
            IntakeLimits(**limits),
        )

    def hear(self, payload: bytes, sender: str = "lamp", *, retained: bool = False) -> None:
        self.intake.news(Delivery(A.path(NEWS, sender), payload, retained))

    def told(self, *entries: Entry, sender: str = "lamp") -> dict[Verdict, int]:
        """The verdicts on news of these entries."""
        before = self.intake.counts.copy()
        self.hear(encode(News(list(entries))), sender)
        return dict(self.intake.counts - before)

    def size(self) -> int:
        return self.memory.stats().entries


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    made = Door(tmp_path)
    yield made
    made.memory.close()


def test_genuine_news_is_kept_once(door: Door) -> None:
    assert door.told(entry(LAMP, 1), entry(LAMP, 2)) == {Verdict.ACCEPTED: 2}
    assert door.told(entry(LAMP, 1), entry(LAMP, 3)) == {Verdict.ACCEPTED: 1, Verdict.DUPLICATE: 1}
    assert door.size() == 3


def test_own_news_coming_back_is_not_even_looked_at(door: Door) -> None:
    assert door.told(entry(ME, 1), sender="me") == {}
    assert door.size() == 0


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (entry(LAMP, 1, space=b"another space..."), Verdict.OTHER_SPACE),
        (entry(LAMP, 1, signed=False), Verdict.BAD_SIGNATURE),
        (msgspec.structs.replace(entry(LAMP, 1), token=8), Verdict.BAD_SIGNATURE),
        (msgspec.structs.replace(entry(LAMP, 1), signature=entry(LAMP, 2).signature), Verdict.BAD_SIGNATURE),
        (msgspec.structs.replace(entry(LAMP, 1), origin=FRIDGE.public), Verdict.UNKNOWN_ORIGIN),
        (msgspec.structs.replace(entry(FRIDGE, 1), origin=LAMP.public), Verdict.BAD_SIGNATURE),
        (entry(FRIDGE, 1), Verdict.UNKNOWN_ORIGIN),  # genuine, but replayed by somebody else
        (entry(STRANGER, 1), Verdict.UNKNOWN_ORIGIN),
        (msgspec.structs.replace(entry(LAMP, 1), count=1001), Verdict.ABSURD),
        (msgspec.structs.replace(entry(LAMP, 1), p=1.5), Verdict.ABSURD),
        (msgspec.structs.replace(entry(LAMP, 1), p=float("nan")), Verdict.ABSURD),
        (msgspec.structs.replace(entry(LAMP, 1), token=-1), Verdict.ABSURD),
        (msgspec.structs.replace(entry(LAMP, 1), key=bytes(32)), Verdict.ABSURD),
        (entry(LAMP, 1, token=100), Verdict.ABSURD),  # the model has no such token
        (sign_entry(msgspec.structs.replace(entry(LAMP, 1), key=b"k" * 8192), LAMP.sign), Verdict.ABSURD),
        (msgspec.structs.replace(entry(LAMP, 1), tail=b"short"), Verdict.MALFORMED),
        (msgspec.structs.replace(entry(LAMP, 1), key=b""), Verdict.MALFORMED),
    ],
)
def test_what_is_wrong_is_refused_and_the_rest_of_the_message_kept(door: Door, wrong: Entry, verdict: Verdict) -> None:
    assert door.told(wrong, entry(LAMP, 5)) == {verdict: 1, Verdict.ACCEPTED: 1}
    assert door.size() == 1


def test_a_changed_copy_of_something_genuine_is_checked_again(door: Door) -> None:
    """What was found genuine once is remembered as a whole, not by its signature."""
    genuine = entry(LAMP, 1)
    door.told(genuine)
    assert door.told(msgspec.structs.replace(genuine, token=8)) == {Verdict.BAD_SIGNATURE: 1}


def test_quarantined_origins_are_refused(door: Door) -> None:
    while not door.trust.note(LAMP.public, wrong=True):
        pass
    assert door.told(entry(LAMP, 1)) == {Verdict.QUARANTINED: 1}
    assert door.told(entry(FRIDGE, 1), sender="fridge") == {Verdict.ACCEPTED: 1}


def test_a_retained_message_is_no_news(door: Door) -> None:
    door.hear(encode(News([entry(LAMP, 1)])), retained=True)
    assert door.intake.counts == {Verdict.MALFORMED: 1}


def test_another_version_is_counted_as_such(door: Door) -> None:
    door.hear(msgspec.msgpack.encode([2, "whatever"]))
    assert door.intake.counts == {Verdict.VERSION: 1}


class TestFloods:
    def test_of_one_device_are_stopped_and_end(self, tmp_path: Path) -> None:
        door = Door(tmp_path, news_rate=1.0, news_burst=20)
        for number in range(100):
            door.told(entry(LAMP, number))
        assert door.size() == 20
        assert door.intake.counts[Verdict.FLOOD] == 80
        door.clock.now += 5
        for number in range(100, 110):
            door.told(entry(LAMP, number))
        assert door.size() == 25
        door.memory.close()

    def test_of_forgeries_do_not_use_up_what_the_real_one_may_send(self, tmp_path: Path) -> None:
        door = Door(tmp_path, sender_rate=1.0, sender_burst=30, news_rate=1.0, news_burst=20)
        forged = [msgspec.structs.replace(entry(FRIDGE, n), origin=LAMP.public) for n in range(100)]
        for one in forged:
            door.intake.check("fridge", [one])  # as in answers, where others' entries are welcome
        assert door.intake.counts == {Verdict.BAD_SIGNATURE: 30, Verdict.FLOOD: 70}
        assert door.told(entry(LAMP, 1)) == {Verdict.ACCEPTED: 1}
        door.memory.close()

    def test_of_a_device_with_ever_new_keys_are_stopped_as_well(self, tmp_path: Path) -> None:
        door = Door(tmp_path, news_rate=1.0, news_burst=20)
        for number in range(100, 150):
            door.book.devices["lamp"] = someone(number).public
            door.told(entry(someone(number), number))
        assert door.size() == 20
        assert door.intake.counts[Verdict.FLOOD] == 30
        assert door.told(entry(FRIDGE, 1), sender="fridge") == {Verdict.ACCEPTED: 1}
        door.memory.close()


def test_news_that_the_disk_refuses_wait_in_memory(tmp_path: Path) -> None:
    """The broker does not send them again."""
    door = Door(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes that any file may have
    try:
        assert door.told(entry(LAMP, 1), entry(LAMP, 2)) == {Verdict.UNSAVED: 2}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert door.size() == 2
    door.memory.flush()
    door.memory.close()
    with EntryMemory(tmp_path) as memory:
        assert memory.stats().entries == 2


class TestNewcomers:
    def test_news_that_comes_before_its_sender_announced_itself_waits(self, door: Door) -> None:
        door.told(entry(STRANGER, 1), sender="stranger")
        assert door.size() == 0
        door.intake.retry()
        assert door.size() == 0
        door.book.devices["stranger"] = STRANGER.public
        door.intake.retry()
        assert door.size() == 1
        assert door.intake.counts[Verdict.UNKNOWN_ORIGIN] == 0

    def test_but_not_in_any_number(self, tmp_path: Path) -> None:
        door = Door(tmp_path, held=10_000, held_messages=50)
        for number in range(500):
            door.hear(bytes(100 + number % 7), sender=f"nobody-{number}")
        assert door.intake.counts[Verdict.UNKNOWN_ORIGIN] >= 450
        assert len(door.intake._held) <= 50
        assert door.intake._held_bytes == sum(len(delivery.payload) for delivery in door.intake._held) <= 10_000
        door.memory.close()


class TestHostile:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(payload=st.binary(max_size=600), sender=st.sampled_from(["lamp", "fridge", "nobody", "a/b", ""]))
    def test_random_messages(self, door: Door, payload: bytes, sender: str) -> None:
        before = door.intake.counts.total()
        door.hear(payload, sender)
        assert door.intake.counts.total() - before <= 1
        assert door.size() == 0

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        fields=st.lists(
            st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=80) | st.text(max_size=9),
            min_size=7,
            max_size=10,
        )
    )
    def test_entries_of_anything(self, door: Door, fields: Sequence[Any]) -> None:
        door.hear(msgspec.msgpack.encode([1, [fields, fields]]))
        assert door.intake.counts[Verdict.ACCEPTED] == 0
        assert door.size() == 0

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        change=st.fixed_dictionaries(
            {},
            optional={
                "space": st.binary(max_size=20) | st.just(SPACE),
                "key": st.binary(max_size=64),
                "tail": st.binary(max_size=10),
                "token": st.integers(-(2**63), 2**63),
                "p": st.floats(),
                "count": st.integers(-(2**63), 2**63),
                "time": st.integers(-(2**63), 2**63),
                "origin": st.binary(max_size=40) | st.just(FRIDGE.public),
                "signature": st.binary(max_size=70),
            },
        )
    )
    def test_a_genuine_entry_with_any_change_is_refused(self, door: Door, change: dict[str, Any]) -> None:
        genuine = entry(LAMP, 1)
        changed = msgspec.structs.replace(genuine, **change)
        assume(changed != genuine)
        door.hear(encode(News([changed])))
        assert door.size() == 0

    def test_memory_is_bounded_whatever_comes(self, tmp_path: Path) -> None:
        door = Door(tmp_path, seen=50)
        for number in range(200):
            door.told(entry(LAMP, number))
        assert len(door.intake._seen) == 50
        door.memory.close()
