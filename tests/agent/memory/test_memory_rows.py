"""The slot map and its hash table against plain dicts; tails against their definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.memory.key import shared_tail as shared_by_bytes
from agent.memory.memory_rows import FIELDS, Rows, shared_tail, slots_of, tail_bytes, tail_code
from agent.memory.store import identity_of
from tests.agent.memory.memories import entry, keys

tails = st.lists(st.sampled_from([b"aa", b"ab", b"\x00\x00", b"\xff\xff"]), min_size=4, max_size=4).map(b"".join)


@given(tails, tails)
def test_tails_are_compared_from_the_last_token_on(one: bytes, other: bytes) -> None:
    assert tail_bytes(tail_code(one)) == one
    codes = np.array([tail_code(one)], np.uint64)
    assert shared_tail(codes, tail_code(other)).tolist() == [shared_by_bytes(one, other)]


@given(st.binary(min_size=8, max_size=8))
def test_a_tail_survives_being_a_number(tail: bytes) -> None:
    assert tail_bytes(tail_code(tail)) == tail


# few different low bits, so that identities collide in the table
identities = st.builds(lambda high, low: high << 20 | low, st.integers(-5, 5), st.integers(0, 3))
steps = st.lists(st.tuples(st.sampled_from(["take", "drop", "release"]), identities), max_size=120)


@settings(deadline=None)
@given(steps)
def test_rows_know_what_a_dict_would_know(steps: list[tuple[str, int]]) -> None:
    rows = Rows()
    known: dict[int, int] = {}
    dropped: list[int] = []
    ever: set[int] = set()
    for step, identity in steps:
        if step == "take" and identity not in known:
            id = rows.take(identity, 7, 0.5, 1, 1, 3, 2)
            assert id not in ever, "ids are never used again"
            ever.add(id)
            known[identity] = id
        elif step == "drop" and identity in known:
            gone = rows.drop(np.array([known[identity]]))
            assert gone.tolist() == [known.pop(identity)]
            dropped += gone.tolist()
        elif step == "release":
            rows.release(np.array(dropped, np.int64))
            dropped = []
        assert rows.find(identity) == known.get(identity)
        assert len(rows) == len(known)
    everything = np.array(sorted(ever), np.int64)
    assert rows.alive(everything).tolist() == [id in known.values() for id in everything.tolist()]
    assert sorted(rows.where("origin", 3).tolist()) == sorted(rows.ids().tolist()) == sorted(known.values())
    assert rows.counts("space") == ({2: len(known)} if known else {})
    assert len(set(slots_of(rows.ids()).tolist())) == len(known), "no slot is taken twice"


def test_rows_grow_and_load() -> None:
    identities = np.random.default_rng(1).integers(-(1 << 62), 1 << 62, 20_000).tolist()
    rows = Rows()
    ids = [rows.take(identity, 1 << 63 | n, 0.25, n, 1, 1, 1) for n, identity in enumerate(identities)]
    rows.drop(np.array(ids[::3]))
    again = Rows()
    stored = [
        (id, identity, (1 << 63 | n) - (1 << 64), 0.25, 1.0, n, 1, 1, 1)
        for n, (id, identity) in enumerate(zip(ids, identities, strict=True))
        if n % 3
    ]
    assert len(stored[0]) == len(FIELDS)
    again.load(Rows.read(stored), rows.serial)
    for one in (rows, again):
        assert [one.find(identity) for identity in identities] == [id if n % 3 else None for n, id in enumerate(ids)]
        assert one.of("tail", np.array(ids[1:2])).tolist() == [1 << 63 | 1]
    new = again.take(5, 0, 0.5, 0, 1, 1, 1)
    assert slots_of(np.array([new]))[0] in slots_of(np.array(ids[::3])), "a free slot is taken before a new one"
    assert new not in ids


def test_identity_is_of_what_is_said_and_who_says_it() -> None:
    one = entry(1, keys(1)[0])
    same = entry(1, keys(1)[0], p=0.9, count=7, time=5, signature=b"x" * 64)
    assert identity_of(one) == identity_of(same)
    others = [
        entry(1, keys(1, seed=2)[0]),
        entry(1, keys(1)[0], token=2),
        entry(1, keys(1)[0], tail=b"another1"),
        entry(1, keys(1)[0], space=b"s" * 16),
        entry(1, keys(1)[0], origin=b"q" * 32),
    ]
    assert len({identity_of(other) for other in [one, *others]}) == 6
