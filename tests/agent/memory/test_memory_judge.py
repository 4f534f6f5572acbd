from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.memory.memory import EntryMemory
from tests.agent.memory.memories import ORIGIN, PATIENCE, SPACE, entries, entry, indexed, keys, opened, stored, tokens

OTHER = b"p" * 32


def trust(memory: EntryMemory, number: int, known: np.ndarray) -> float:
    (found,) = memory.neighbours(SPACE, known[number], bytes(8), 1)
    assert found.token == number
    return found.trust


def id_of(memory: EntryMemory, number: int, known: np.ndarray) -> int:
    return memory.neighbours(SPACE, known[number], bytes(8), 1)[0].id


@pytest.mark.parametrize("where", ["tail", "segment"])
def test_trust_falls_with_errors_and_rises_with_confirmations(tmp_path: Path, where: str) -> None:
    known = keys(200)
    with opened(tmp_path, tail_limit=100 if where == "segment" else 1000) as memory:
        memory.add(entries(known))
        assert memory.settle(PATIENCE)
        one = id_of(memory, 5, known)
        memory.blame([one])
        assert trust(memory, 5, known) == 0.5
        memory.confirm([one])
        assert trust(memory, 5, known) == 0.625
        memory.confirm([one] * 40)
        assert 0.99 < trust(memory, 5, known) <= 1.0
        memory.blame([one, 12345])
        remembered = trust(memory, 5, known)
    with opened(tmp_path) as memory:
        assert trust(memory, 5, known) == remembered


def test_what_proves_wrong_again_and_again_goes_for_good(tmp_path: Path) -> None:
    known = keys(200)
    with opened(tmp_path) as memory:
        memory.add(entries(known))
        assert memory.settle(PATIENCE)
        wrong = id_of(memory, 7, known)
        for _ in range(3):
            memory.blame([wrong])
        assert 7 not in tokens(memory, known[7], 200)
        assert memory.entries([wrong]) == []
        assert memory.stats().counts.blamed == 1
        memory.blame([wrong])
        memory.used([wrong])
        memory.confirm([wrong])
        assert memory.add([entry(7, known[7])]) == 0, "not with the next gossip either"
    with opened(tmp_path) as memory:
        assert len(stored(tmp_path)) == 199
        memory.learn(entry(7, known[7]))
        assert 7 not in tokens(memory, known[7], 200)
        assert memory.stats().counts.refused == 1
        memory.clear()
        assert memory.add([entry(7, known[7])]) == 1, "clearing all clears that, too"


def test_an_id_never_means_another_entry(tmp_path: Path) -> None:
    """The slot of what went is taken by what comes next."""
    known = keys(60)
    with opened(tmp_path) as memory:
        memory.add(entries(known[:30]))
        old = id_of(memory, 3, known)
        for _ in range(3):
            memory.blame([old])
        memory.flush()
        memory.add(entries(known[30:], first=30))
        new = [id_of(memory, number, known) for number in range(30, 60)]
        assert old & 0xFFFFFF in {id & 0xFFFFFF for id in new}, "the slot was not used again"
        memory.blame([old])
        memory.blame([old])
        memory.blame([old])
        assert [trust(memory, number, known) for number in range(30, 60)] == [1.0] * 30
        assert memory.entries([old]) == []
    with opened(tmp_path) as memory:
        assert [id_of(memory, number, known) for number in range(30, 60)] == new
        assert indexed(memory) == sorted(stored(tmp_path))


def test_audits_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as memory:
        assert memory.origin_record(OTHER) == (0.0, 0.0)
        memory.note_audit(OTHER, True)
        memory.note_audit(OTHER, False)
        memory.note_audit(OTHER, True, keep=0.5)
        assert memory.origin_record(OTHER) == (2.0, 1.5)
    with opened(tmp_path) as memory:
        assert memory.origin_record(OTHER) == (2.0, 1.5)
        (of,) = memory.origins()
        assert (of.origin, of.entries, of.audits, of.wrong, of.quarantined) == (OTHER, 0, 2.0, 1.5, False)


def test_a_quarantined_origin_is_heard_no_more(tmp_path: Path) -> None:
    known = keys(300)
    with opened(tmp_path) as memory:
        memory.add(entries(known[:150], origin=OTHER))
        assert memory.settle(PATIENCE)
        memory.add(entries(known[150:200], first=150, origin=OTHER))
        memory.add(entries(known[200:], first=200))
        memory.note_audit(OTHER, True)
        memory.forget_origin(OTHER)
        assert min(tokens(memory, known[10], 300)) >= 200, "at once"
        assert memory.add([entry(400, known[0], origin=OTHER)]) == 0
        memory.learn(entry(401, known[1], origin=OTHER))
        memory.flush()
        assert memory.stats().entries == len(stored(tmp_path)) == 100
        assert memory.settle(PATIENCE)
        assert indexed(memory) == sorted(stored(tmp_path))
    with opened(tmp_path) as memory:
        assert memory.add([entry(400, known[0], origin=OTHER)]) == 0, "nor after a restart"
        assert memory.stats().quarantined == 1
        (of,) = [of for of in memory.origins() if of.origin == OTHER]
        assert (of.quarantined, of.entries, of.dropped, of.wrong) == (True, 0, 200, 1.0)
        memory.clear(origin=OTHER)
        assert memory.origin_record(OTHER) == (0.0, 0.0)
        assert memory.add([entry(400, known[0], origin=OTHER)]) == 1, "an operator lifts it"


def test_clear_forgets_a_space_an_origin_or_all(tmp_path: Path) -> None:
    known = keys(400)
    space = b"another model..."[:16]
    with opened(tmp_path) as memory:
        memory.add(entries(known[:100]))
        memory.add(entries(known[100:250], first=100, space=space))
        memory.add(entries(known[250:], first=250, origin=OTHER))
        assert memory.clear(space=space) == 150
        assert tokens(memory, known[120], 5, space) == []
        assert memory.clear(origin=OTHER) == 150
        assert max(tokens(memory, known[300], 400)) < 100
        assert memory.clear(origin=b"q" * 32) == 0
        assert sorted(stored(tmp_path).values()) == list(range(100))
        assert memory.clear() == 100
        assert memory.stats().entries == 0
        assert memory.add(entries(known[:10])) == 10
    with opened(tmp_path) as memory:
        assert memory.stats().entries == 10
        assert [of.origin for of in memory.origins()] == [ORIGIN], "nothing is known of the others"


def test_nothing_of_what_was_cleared_is_left_on_the_disk(tmp_path: Path) -> None:
    secret = keys(150, width=64, seed=7)
    with opened(tmp_path) as memory:
        memory.add(entries(secret))
        memory.add(entries(keys(150, width=64), first=500, origin=OTHER))
        assert memory.settle(PATIENCE)
        assert any(secret[3].tobytes() in path.read_bytes() for path in tmp_path.iterdir())
        memory.clear(origin=ORIGIN)
        for path in tmp_path.iterdir():
            content = path.read_bytes()
            assert not any(key.tobytes()[:16] in content for key in secret), path.name
        assert len(tokens(memory, secret[0], 400)) > 0
