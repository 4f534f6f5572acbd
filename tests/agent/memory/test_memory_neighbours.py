from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from agent.memory.index import near as near_in
from agent.memory.memory import EntryMemory
from agent.memory.memory_rows import tail_code
from agent.memory.segments_build import Built, ChildBuilder, Order
from protocol.errors import ProtocolError
from tests.agent.memory.memories import (
    ORIGIN,
    PATIENCE,
    SPACE,
    WIDTH,
    Keys,
    entries,
    entry,
    indexed,
    keys,
    opened,
    stored,
    tail,
    tokens,
)


def cosines(known: Keys, query: Keys) -> np.ndarray:
    a, b = known.astype(float), query.astype(float)
    return a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)


def near(known: Keys, seed: int = 9) -> Keys:
    """A slightly different key for each."""
    moved = known + np.random.default_rng(seed).integers(-12, 13, known.shape)
    return np.clip(moved, -127, 127).astype(np.int8)


def test_order_and_similarity_are_those_of_brute_force(tmp_path: Path) -> None:
    known = keys(90, width=576)
    with opened(tmp_path) as memory:
        memory.add(entries(known))
        for query in keys(20, width=576, seed=1):
            right = cosines(known, query)
            found = memory.neighbours(SPACE, query, bytes(8), 12)
            assert [n.token for n in found] == np.argsort(-right)[:12].tolist()
            assert [n.similarity for n in found] == pytest.approx(np.sort(right)[::-1][:12], abs=1e-12)


def test_a_neighbour_is_its_entry(tmp_path: Path) -> None:
    known = keys(3)
    with opened(tmp_path) as memory:
        one = entry(1, known[1], p=0.25, count=7, signature=b"s" * 64)
        memory.add([entry(0, known[0]), one])
        memory.learn(entry(2, known[2]))
        (found,) = memory.neighbours(SPACE, known[1], tail(1), 1)
        assert (found.token, found.p, found.count, found.trust, found.origin) == (1, 0.25, 7, 1.0, ORIGIN)
        assert found.similarity == pytest.approx(1.0)
        assert found.tail == 8
        assert found.key.tobytes() == one.key
        (other,) = memory.neighbours(SPACE, known[2], bytes(8), 1)
        assert memory.entries([other.id, 12345, found.id]) == [entry(2, known[2]), one], "durable or not"


def test_segments_find_what_is_near_with_its_exact_similarity(tmp_path: Path) -> None:
    known = keys(3000, width=64)
    with opened(tmp_path) as memory:
        memory.add(entries(known))
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].unindexed < 100 <= memory.stats().spaces[0].segments * 3000
        queries = near(known[:300])
        found = [memory.neighbours(SPACE, query, bytes(8), 1)[0] for query in queries]
        right = sum(n.token == number for number, n in enumerate(found))
        assert right >= 294
        exact = [cosines(known[n.token][None], query)[0] for n, query in zip(found, queries, strict=True)]
        assert [n.similarity for n in found] == pytest.approx(exact, abs=1e-12)


def test_other_spaces_and_widths_never_match(tmp_path: Path) -> None:
    known = keys(400)
    other = b"another model..."
    with opened(tmp_path) as memory:
        memory.add(entries(known[:200]) + entries(known[200:], first=200, space=other))
        memory.add(entries(keys(5, width=WIDTH + 1), first=1000))
        assert memory.settle(PATIENCE)
        memory.add(entries(keys(20, seed=5), first=600, space=other))
        for query in known[190:210]:
            mine, theirs = tokens(memory, query, 400), tokens(memory, query, 400, other)
            assert mine
            assert theirs
            assert max(mine) < 200 <= min(theirs)
            assert max(theirs) < 1000
        assert tokens(memory, known[0], 5, b"nobody's space.."[:16]) == []
    with opened(tmp_path) as memory:
        assert max(tokens(memory, known[250], 400)) < 200, "nor after a restart"
        assert sorted(tokens(memory, keys(1, width=WIDTH + 1)[0], 9)) == [1000, 1001, 1002, 1003, 1004]


def test_an_entry_is_learned_once_and_its_count_only_grows(tmp_path: Path) -> None:
    key = keys(1)[0]
    first = entry(0, key, count=2)
    with opened(tmp_path) as memory:
        assert memory.add([first, first]) == 1
        memory.learn(first)
        assert memory.add([replace_(first, count=1, p=0.1)]) == 0
        assert memory.neighbours(SPACE, key, bytes(8), 9)[0].count == 2
        newer = replace_(first, count=5, p=0.75, time=first.time + 9, signature=b"n" * 64)
        memory.learn(newer)
        (found,) = memory.neighbours(SPACE, key, bytes(8), 9)
        assert (found.count, found.p) == (5, 0.75)
        assert memory.entries([found.id]) == [newer]
        assert memory.add([replace_(first, origin=b"p" * 32)]) == 1, "another origin's word is another entry"
    with opened(tmp_path) as memory:
        assert memory.add([first, newer]) == 0
        assert sorted(n.count for n in memory.neighbours(SPACE, key, bytes(8), 9)) == [2, 5]


def replace_(one: object, **changes: object):  # type: ignore[no-untyped-def]
    return msgspec.structs.replace(one, **changes)  # type: ignore[type-var]


@pytest.mark.parametrize(
    "changes",
    [
        {"space": b"short"},
        {"tail": b"123456789"},
        {"origin": b""},
        {"signature": b"x"},
        {"key": b""},
        {"key": bytes(WIDTH)},
        {"token": -1},
        {"token": 1 << 31},
        {"p": 0.0},
        {"p": 1.5},
        {"p": float("nan")},
        {"count": 0},
        {"time": -1},
    ],
)
def test_malformed_entries_change_nothing(tmp_path: Path, changes: dict[str, object]) -> None:
    with opened(tmp_path) as memory:
        good, bad = entry(0, keys(1)[0]), replace_(entry(1, keys(1)[0]), **changes)
        with pytest.raises(ProtocolError):
            memory.add([good, bad])
        with pytest.raises(ProtocolError):
            memory.learn(bad)
        memory.flush()
        assert memory.stats().entries == 0
        assert stored(tmp_path) == {}


def test_queries_that_nothing_can_be_near_to(tmp_path: Path) -> None:
    with opened(tmp_path) as memory:
        assert memory.neighbours(SPACE, keys(1)[0], bytes(8), 5) == []
        memory.add(entries(keys(5)))
        assert memory.neighbours(SPACE, np.zeros(WIDTH, np.int8), bytes(8), 5) == []
        assert memory.neighbours(SPACE, keys(1)[0], bytes(8), 0) == []
        assert len(memory.neighbours(SPACE, keys(1)[0], bytes(8), 50)) == 5


def candidates(memory: EntryMemory, key: Keys, end: bytes) -> set[int]:
    """Tokens of what is looked at in the segments for one neighbour."""
    state = memory._state
    (partition,) = state.partitions.values()
    return set(state.rows.of("token", near_in(partition.segments, key, tail_code(end), 1)).tolist())


def test_the_same_last_tokens_are_looked_at_whatever_the_key(tmp_path: Path) -> None:
    """Each hash of a tail is two bytes: of the last 1, 2, 4 and 8 tokens."""
    known = keys(2000, width=64)
    shared = {1999: b"aabbccdd", 998: b"aabbccxx", 1997: b"aabbxxdd", 1996: b"aaxxccdd"}
    learned = [entry(n, key, tail=shared.get(n, tail(n))) for n, key in enumerate(known)]
    opposite = -known[1999]
    with opened(tmp_path) as memory:
        for part in (learned[1000:], learned[:1000]):
            memory.add(part)
            assert memory.settle(PATIENCE)
        looked_at = candidates(memory, opposite, b"aabbccdd")
        assert looked_at >= {1999, 998, 1997}
        assert 1996 not in looked_at, "one shared token is no reason to look"
        assert len(looked_at) < 40
        assert candidates(memory, opposite, bytes(8)).isdisjoint(shared), "it is the tail that found them"
        memory.learn(entry(5000, opposite, tail=b"aabbccxx"))
        found = memory.neighbours(SPACE, opposite, b"aabbccdd", 5000)
        assert {n.token: n.tail for n in found if n.tail} == {1999: 8, 998: 4, 1997: 2, 1996: 1, 5000: 4}
        assert (found[0].token, found[-1].token) == (5000, 1999), "similarity decides the order"


def test_of_many_with_the_same_tail_the_newest_are_looked_at(tmp_path: Path) -> None:
    known = keys(3000, width=64)
    with opened(tmp_path) as memory:
        memory.add(entries(known, tail=b"template"))
        assert memory.settle(PATIENCE)
        looked_at = candidates(memory, -known[2999], b"template")
        assert len(looked_at) < 40
        assert looked_at >= set(range(2984, 3000))
        assert candidates(memory, -known[2999], b"tempLATE") >= set(range(2984, 3000)), "by their last 2 tokens, too"


def test_learning_and_looking_up_wait_for_no_commit(tmp_path: Path) -> None:
    known = keys(30)
    with opened(tmp_path) as memory, closing(sqlite3.connect(tmp_path / "memory.db", isolation_level=None)) as other:
        memory.add(entries(known[:10]))
        other.execute("BEGIN IMMEDIATE")  # from now on nobody else can commit
        for number in range(10, 30):
            memory.learn(entry(number, known[number]))
            assert tokens(memory, known[number]) == [number]
        memory.confirm([memory.neighbours(SPACE, known[3], bytes(8), 1)[0].id])
        memory.note_audit(ORIGIN, True)
        assert memory.stats().pending == 20
        assert len(stored(tmp_path)) == 10
        other.execute("ROLLBACK")
        memory.flush()
        assert memory.stats().pending == 0
        assert sorted(stored(tmp_path).values()) == list(range(30))


class Held:
    """Builds when it is let; `underway` is set when it was asked."""

    def __init__(self) -> None:
        self.underway = threading.Event()
        self.let = threading.Event()
        self._build = ChildBuilder()

    def __call__(self, order: Order) -> Built:
        self.underway.set()
        assert self.let.wait(PATIENCE)
        return self._build(order)


def test_learning_and_looking_up_wait_for_no_merge(tmp_path: Path) -> None:
    known = keys(400)
    build = Held()
    with opened(tmp_path, build=build) as memory:
        memory.add(entries(known[:200]))
        assert build.underway.wait(PATIENCE)
        memory.add(entries(known[200:300], first=200))
        for number in range(300, 400):
            memory.learn(entry(number, known[number]))
        assert [tokens(memory, key) for key in known] == [[number] for number in range(400)]
        assert memory.stats().spaces[0].segments == 0
        build.let.set()
        assert memory.settle(PATIENCE)
        assert memory.stats().spaces[0].segments > 0
        assert [tokens(memory, key) for key in known] == [[number] for number in range(400)]
        assert indexed(memory) == sorted(stored(tmp_path))


def test_three_threads(tmp_path: Path) -> None:
    """One adds, one learns and judges, one looks up what both have finished with."""
    known = keys(1200, width=16)
    finished: list[int] = []
    failures: list[str] = []

    def adds(memory: EntryMemory) -> None:
        for start in range(0, 600, 50):
            assert memory.add(entries(known[start : start + 50], first=start)) == 50
            finished.append(start)

    def learns(memory: EntryMemory) -> None:
        for number in range(600, 1200):
            memory.learn(entry(number, known[number]))
            (found,) = memory.neighbours(SPACE, known[number], bytes(8), 1)
            if found.similarity < 1 - 1e-9:
                failures.append(f"{number} was not found when it was learned")
            memory.used([found.id])
            memory.confirm([found.id])

    def looks(memory: EntryMemory) -> None:
        for _ in range(600):
            start = finished[-1] if finished else None
            if start is not None and memory.neighbours(SPACE, known[start], bytes(8), 1)[0].similarity < 1 - 1e-9:
                failures.append(f"{start} was not found after it was added")

    with opened(tmp_path) as memory:
        threads = [threading.Thread(target=work, args=(memory,)) for work in (adds, learns, looks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        memory.flush()
        assert failures == []
        assert sorted(stored(tmp_path).values()) == list(range(1200))
        assert memory.settle(PATIENCE)
        assert indexed(memory) == sorted(stored(tmp_path))


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    known = keys(250)
    with opened(tmp_path) as memory:
        for number, key in enumerate(known):
            memory.learn(entry(number, key))
    with opened(tmp_path) as memory:
        assert [tokens(memory, key) for key in known] == [[number] for number in range(250)]
        assert memory.add(entries(known)) == 0
        memory.close()
        memory.close()
