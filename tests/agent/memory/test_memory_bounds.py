from __future__ import annotations

from pathlib import Path

from agent.memory.memory import EntryMemory
from agent.memory.memory_bounds import disk_bytes
from tests.agent.memory.memories import (
    PATIENCE,
    SPACE,
    Clock,
    entries,
    entry,
    indexed,
    keys,
    opened,
    stored,
    tokens,
)

DAY = 86_400.0
BOUND = 2_000_000


def rest(memory: EntryMemory) -> None:
    """Waits until nothing is left to do: eviction follows a commit, merges follow eviction."""
    memory.flush()
    memory.flush()
    assert memory.settle(PATIENCE)
    memory.flush()
    memory.flush()


def test_the_bound_holds_on_the_disk_however_much_comes(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=BOUND, tail_limit=400) as memory:
        for turn in range(10):
            memory.add(entries(keys(600, width=128, seed=turn), first=600 * turn))
            rest(memory)
            assert disk_bytes(tmp_path) <= BOUND
        assert memory.stats().counts.evicted > 3000
        assert memory.stats().entries > 1500, "the room is used"
        assert indexed(memory) == sorted(stored(tmp_path))
        newest = keys(600, width=128, seed=9)
        assert [tokens(memory, key) for key in newest[-50:]] == [[5950 + n] for n in range(50)]
    assert disk_bytes(tmp_path) <= BOUND
    with opened(tmp_path, max_bytes=BOUND) as memory:
        assert indexed(memory) == sorted(stored(tmp_path))


def test_other_widths_take_the_place_of_the_old(tmp_path: Path) -> None:
    """After a change of model, keys have another size, and slots that become free do not fit."""
    with opened(tmp_path, max_bytes=BOUND, tail_limit=400) as memory:
        for turn, width in enumerate((64, 64, 700, 700, 300, 64)):
            for part in range(3):
                first = 3000 * turn + 1000 * part
                memory.add(entries(keys(1000, width=width, seed=first), first=first))
            rest(memory)
            assert disk_bytes(tmp_path) <= BOUND
            assert tokens(memory, keys(1000, width=width, seed=first)[-1]) == [first + 999]


def test_a_smaller_bound_makes_the_file_smaller(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=BOUND) as memory:
        memory.add(entries(keys(2000, width=128)))
        assert memory.settle(PATIENCE)
    with opened(tmp_path, max_bytes=BOUND // 2) as memory:
        rest(memory)
        assert disk_bytes(tmp_path) <= BOUND // 2
        assert 300 < memory.stats().entries < 1300
        assert indexed(memory) == sorted(stored(tmp_path))


def test_the_useful_stay(tmp_path: Path) -> None:
    """The same age for all; then what is used, trusted and confirmed by its origin outlives the others."""
    clock = Clock()
    known = keys(1500, width=128)
    with opened(tmp_path, max_bytes=BOUND, clock=clock, wall=Clock()) as memory:
        counted = [entry(n, known[n], count=9) for n in range(100, 150)]
        memory.add(entries(known[:100]) + counted + entries(known[150:], first=150))
        ids = {n.token: n.id for key in known for n in memory.neighbours(SPACE, key, bytes(8), 1)}
        used, doubted = range(50), range(200, 250)
        memory.used([ids[n] for n in used])
        memory.blame([ids[n] for n in doubted])
        clock.now += 90 * DAY
        memory.used([ids[n] for n in range(150, 200)])
        for turn in range(1, 4):
            memory.add(entries(keys(500, width=128, seed=turn), first=10_000 * turn))
        memory.flush()
        left = set(stored(tmp_path).values())
        evicted = memory.stats().counts.evicted
        assert evicted > 400
        assert left.issuperset(used)
        assert left.issuperset(range(100, 200))
        assert left.isdisjoint(doubted), "these go first"


def test_entries_go_with_age_and_a_confirmation_makes_them_young(tmp_path: Path) -> None:
    clock = Clock()
    known = keys(300)
    with opened(tmp_path, max_age=180 * DAY, clock=clock, wall=Clock()) as memory:
        memory.add(entries(known[:200]))
        assert memory.settle(PATIENCE)
        clock.now += 100 * DAY
        memory.add(entries(known[200:], first=200))
        memory.confirm([n.id for n in memory.neighbours(SPACE, known[5], bytes(8), 1)])
        memory.add([entry(6, known[6], count=2)])
        memory.used([n.id for n in memory.neighbours(SPACE, known[7], bytes(8), 1)])
        memory.flush()
        clock.now += 81 * DAY
        memory.flush()
        memory.flush()
        assert set(stored(tmp_path).values()) == {5, 6, *range(200, 300)}, "use alone does not make anything true"
        assert memory.stats().counts.aged == 198
        assert memory.settle(PATIENCE)
        assert indexed(memory) == sorted(stored(tmp_path))


def test_a_clock_that_jumps_makes_nothing_old(tmp_path: Path) -> None:
    clock, wall = Clock(), Clock(1.7e9)
    with opened(tmp_path, max_age=40 * DAY, clock=clock, wall=wall) as memory:
        memory.add(entries(keys(50)))
        wall.now += 400 * DAY
        memory.flush()
        memory.flush()
        assert len(stored(tmp_path)) == 50, "running"
    wall.now += 400 * DAY
    for turn in range(20):
        with opened(tmp_path, max_age=40 * DAY, clock=Clock(5.0), wall=wall) as memory:
            memory.flush()
            memory.flush()
            assert memory.stats().age_s <= (turn + 1) * DAY + 1
            assert len(stored(tmp_path)) == 50, "across a restart"
        wall.now += (-1) ** turn * 400 * DAY
    with opened(tmp_path, max_age=40 * DAY, clock=(late := Clock()), wall=wall) as memory:
        late.now += 41 * DAY
        memory.flush()
        memory.flush()
        assert stored(tmp_path) == {}


def test_a_night_off_counts(tmp_path: Path) -> None:
    wall = Clock(1.7e9)
    with opened(tmp_path, clock=Clock(), wall=wall) as memory:
        memory.add(entries(keys(1)))
        before = memory.stats().age_s
    wall.now += 8 * 3600
    with opened(tmp_path, clock=Clock(77.0), wall=wall) as memory:
        assert memory.stats().age_s == before + 8 * 3600
