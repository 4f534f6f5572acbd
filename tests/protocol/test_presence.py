"""The roster: what an observer believes, whatever it is sent and in whatever order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolError
from protocol.presence import MAX_DEVICES, MAX_SESSION, NEW_KEYS, Roster, Seen, Status, decode_status, status
from protocol.topics import Cluster
from protocol.transport.base import Delivery

CLUSTER = Cluster("home", "main")
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
SPACE = b"s" * 16


def told(payload: bytes, name: str = "a", *, retained: bool = False) -> Delivery:
    return Delivery(f"skerry/1/home/main/{name}/status", payload, retained)


def birth(session: int, key: bytes = KEY, spaces: tuple[bytes, ...] = (SPACE,)) -> Delivery:
    return told(status(session, True, key, spaces))


def end(session: int, key: bytes = KEY) -> Delivery:
    return told(status(session, False, key))


def after(*deliveries: Delivery) -> tuple[Roster, Seen | None]:
    roster = Roster(CLUSTER)
    for delivery in deliveries:
        roster.take(delivery)
    return roster, roster.get("a")


def test_the_message_as_it_is_on_the_wire() -> None:
    payload = status(7, True, KEY, [SPACE], "0.1.0")
    assert msgspec.json.decode(payload) == {
        "version": 1,
        "session": 7,
        "online": True,
        "key": "6b" * 32,
        "spaces": ["73" * 16],
        "agent": "0.1.0",
    }
    assert decode_status(payload) == Status(7, True, "6b" * 32, ["73" * 16], "0.1.0")


def test_birth_and_end() -> None:
    roster, seen = after(birth(3))
    assert seen == Seen("a", 3, True, KEY, frozenset([SPACE]))
    assert roster.online() == [seen]
    roster, seen = after(birth(3), end(3))
    assert seen == Seen("a", 3, False, KEY)
    assert roster.online() == []


def test_the_late_will_of_an_old_session_does_not_hide_the_new_one() -> None:
    roster, seen = after(birth(3), birth(4), end(3))
    assert seen is not None
    assert (seen.session, seen.online) == (4, True)
    assert roster.stale == 1


def test_a_birth_that_is_delivered_again_does_not_revive() -> None:
    _, seen = after(birth(3), end(3), birth(3), birth(2))
    assert seen is not None
    assert not seen.online


def test_spaces_may_change_within_a_session() -> None:
    _, seen = after(birth(3), birth(3, spaces=()))
    assert seen is not None
    assert (seen.online, seen.spaces) == (True, frozenset())


sessions = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6)


@given(sessions, st.randoms(use_true_random=False))
def test_any_order_and_any_repetition_end_in_the_same(events: list[tuple[int, bool]], chance: object) -> None:
    shuffled = events + events[: len(events) // 2]
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    newest = max(session for session, _ in events)
    _, seen = after(*(birth(session) if online else end(session) for session, online in shuffled))
    assert seen is not None
    assert seen.session == newest
    assert seen.online is all(online for session, online in events if session == newest)


def test_another_key_is_another_device() -> None:
    roster, seen = after(birth(900), birth(2, OTHER_KEY), end(900))
    assert seen is not None
    assert (seen.session, seen.key, seen.online) == (2, OTHER_KEY, True)
    assert roster.rekeyed == 1


class TestNewKeys:
    """A key costs nothing, a name does."""

    def test_a_few_a_day_are_believed(self) -> None:
        now = 0.0
        roster = Roster(CLUSTER, clock=lambda: now)
        for number in range(10):
            roster.take(birth(1, bytes([number]) * 32))
        seen = roster.get("a")
        assert seen is not None
        assert seen.key == bytes([NEW_KEYS]) * 32
        assert (roster.rekeyed, roster.unbelieved) == (NEW_KEYS, 9 - NEW_KEYS)
        roster.take(told(status(1, True, OTHER_KEY), "b"))
        assert roster.get("b") is not None
        now = 86_400.0
        roster.take(birth(1, OTHER_KEY))
        assert roster.get("a") == Seen("a", 1, True, OTHER_KEY, frozenset([SPACE]))

    def test_removing_the_status_or_dying_does_not_help(self) -> None:
        roster = Roster(CLUSTER, clock=lambda: 0.0)
        for number in range(10):
            key = bytes([number]) * 32
            for delivery in (birth(1, key), end(1, key), told(b""), end(1, key), told(b"")):
                roster.take(delivery)
        assert roster.rekeyed == NEW_KEYS
        assert roster.get("a") is None

    def test_none_while_the_last_one_is_barred(self) -> None:
        barred = {KEY}
        roster = Roster(CLUSTER, barred=barred.__contains__)
        for delivery in (birth(1), birth(1, OTHER_KEY), told(b""), birth(1, OTHER_KEY)):
            roster.take(delivery)
        assert roster.get("a") is None
        assert roster.unbelieved == 2
        roster.take(birth(2))
        assert roster.get("a") is not None, "its old key is still its own"
        barred.clear()
        roster.take(birth(1, OTHER_KEY))
        assert roster.get("a") == Seen("a", 1, True, OTHER_KEY, frozenset([SPACE]))


def test_a_removed_status_is_forgotten() -> None:
    roster, seen = after(birth(3), told(b""))
    assert seen is None
    assert roster.online() == []


def test_changes_are_told_once() -> None:
    changes: list[tuple[Seen | None, Seen | None]] = []
    roster = Roster(CLUSTER, lambda before, after: changes.append((before, after)))
    for delivery in (birth(3), birth(3), end(2), end(3), end(3), told(b"")):
        roster.take(delivery)
    assert [(before and before.online, after and after.online) for before, after in changes] == [
        (None, True),
        (True, False),
        (False, None),
    ]


def test_a_crowd_is_bounded_and_the_gone_make_room() -> None:
    roster = Roster(CLUSTER)
    for number in range(MAX_DEVICES + 10):
        roster.take(told(status(1, True, KEY), f"d{number}"))
    assert len(roster.online()) == MAX_DEVICES
    assert roster.crowded == 10
    roster.take(told(status(1, False, KEY), "d0"))
    roster.take(told(status(1, True, KEY), "new"))
    assert roster.get("new") is not None
    assert roster.get("d0") is None
    assert len(roster.online()) == MAX_DEVICES


@pytest.mark.parametrize(
    "change",
    [
        {"session": -1},
        {"session": MAX_SESSION + 1},
        {"session": 1.5},
        {"session": "1"},
        {"online": 1},
        {"key": "6b" * 31},
        {"key": "6B" * 32},
        {"key": "zz" * 32},
        {"key": "6b" * 32 + "\n"},
        {"spaces": ["73" * 15]},
        {"spaces": ["73" * 16] * 33},
        {"spaces": "73" * 16},
        {"agent": "x" * 65},
        {"version": 0},
        {"version": "1"},
        {"version": None},
    ],
)
def test_what_is_out_of_range_is_refused(change: dict[str, object]) -> None:
    fields = {"version": 1, "session": 1, "online": True, "key": "6b" * 32, "spaces": ["73" * 16], "agent": "1"}
    assert decode_status(msgspec.json.encode(fields))
    with pytest.raises(ProtocolError, match="malformed"):
        decode_status(msgspec.json.encode(fields | change))
    with pytest.raises(ProtocolError, match="limit"):
        decode_status(msgspec.json.encode(fields) + b" " * 9000)


def test_a_newer_version_and_new_fields_are_tolerated() -> None:
    fields = {"version": 1, "session": 1, "online": True, "key": "6b" * 32, "colour": {"r": 1}}
    assert decode_status(msgspec.json.encode(fields)) is not None
    roster, seen = after(told(msgspec.json.encode({"version": 2, "entirely": "new"})))
    assert seen is None
    assert (roster.newer, roster.malformed) == (1, 0)


topics = st.one_of(
    st.just("skerry/1/home/main/a/status"),
    st.text(max_size=40),
    st.sampled_from(["skerry/1/home/main//status", "skerry/1/home/main/a/b/status", "skerry/1/home/other/a/status"]),
)
payloads = st.one_of(
    st.binary(max_size=300),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    ).map(msgspec.json.encode),
    st.builds(lambda cut: status(5, True, KEY, [SPACE])[:cut], st.integers(0, 200)),
    st.just(b"[" * 8000),
    st.just(b'{"version":' + b"9" * 400 + b"}"),
)


@given(st.lists(st.tuples(topics, payloads), max_size=8))
def test_rubbish_never_hurts(messages: list[tuple[str, bytes]]) -> None:
    roster = Roster(CLUSTER)
    for topic, payload in messages:
        roster.take(Delivery(topic, payload, False))
    roster.take(birth(MAX_SESSION))
    assert len(roster.online()) == 1
