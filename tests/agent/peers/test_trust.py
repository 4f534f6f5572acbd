"""Trust: how soon a liar is found out, and how seldom anybody honest is taken for one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from agent.memory.memory import EntryMemory
from agent.peers.trust import Trust
from tests.protocol.entries import SPACE, TAIL, entry, key_of, someone

OWN, PEER = someone(1).public, someone(2).public
BASE = 0.05


@dataclass
class Hits:
    """What became of hits of one origin: audited or emitted unaudited, until its quarantine."""

    audited: int = 0
    unaudited: int = 0


def use(trust: Trust, rng: np.random.Generator, wrong: float, most: int = 100_000) -> Hits:
    """The peer's entries are hit again and again; each is wrong with this probability."""
    hits = Hits()
    for _ in range(most):
        if trust.quarantined(PEER):
            break
        if rng.random() < trust.audit_rate([PEER]):
            hits.audited += 1
            trust.note(PEER, wrong=rng.random() < wrong)
        else:
            hits.unaudited += 1
    return hits


@pytest.mark.parametrize("bound", [0.01, 0.05, 0.1, 0.3])
def test_the_bound_on_audits_is_the_one_that_is_derived(bound: float) -> None:
    trust = Trust(OWN, bound=bound, base=BASE)
    assert trust.audits_to_quarantine == math.ceil(math.log(1000) / math.log(min(2.0, (1 + bound) / 2 / bound)))


@pytest.mark.parametrize("bound", [0.05, 0.1, 0.3])
def test_nothing_of_a_newcomer_that_is_always_wrong_is_used_unaudited(bound: float) -> None:
    trust = Trust(OWN, bound=bound, base=BASE)
    hits = use(trust, np.random.default_rng(0), wrong=1.0)
    assert trust.quarantined(PEER)
    assert hits == Hits(audited=trust.audits_to_quarantine, unaudited=0)


@pytest.mark.parametrize("right", [1, 30, 1000, 50_000])
def test_a_long_good_past_does_not_help_one_that_turns_bad(right: int) -> None:
    trust = Trust(OWN, bound=0.1, base=BASE)
    for _ in range(right):
        trust.note(PEER, wrong=False)
    unaudited = []
    for seed in range(200):
        sleeper = Trust(OWN, bound=0.1, base=BASE)
        sleeper._standings[PEER] = trust.standing(PEER)
        hits = use(sleeper, np.random.default_rng(seed), wrong=1.0)
        assert sleeper.quarantined(PEER)
        assert hits.audited <= trust.audits_to_quarantine
        unaudited.append(hits.unaudited)
    assert np.mean(unaudited) < 1.3 * (1 / BASE - 1)  # all before the first audit that found it out


def test_whoever_is_under_suspicion_is_audited_every_time() -> None:
    trust = Trust(OWN, bound=0.1, base=BASE)
    assert trust.audit_rate([PEER]) == 1.0
    for _ in range(200):
        trust.note(PEER, wrong=False)
    assert trust.audit_rate([PEER]) == BASE
    trust.note(PEER, wrong=True)
    assert trust.audit_rate([OWN, PEER]) == 1.0
    audits = next(n for n in count(1) if not trust.note(PEER, wrong=False) and trust.audit_rate([PEER]) < 1.0)
    assert audits < trust.audits_to_quarantine


@pytest.mark.parametrize("wrong", [0.2, 0.4, 0.7])
def test_whatever_is_clearly_over_the_bound_is_caught(wrong: float) -> None:
    for seed in range(20):
        trust = Trust(OWN, bound=0.1, base=BASE)
        use(trust, np.random.default_rng(seed), wrong)
        assert trust.quarantined(PEER)


def test_honest_errors_are_forgiven() -> None:
    """At half the bound: 20 origins, 5,000 audits each."""
    for seed in range(20):
        trust, rng = Trust(OWN, bound=0.1, base=BASE), np.random.default_rng(seed)
        for wrong in rng.random(5000) < 0.05:
            trust.note(PEER, wrong=bool(wrong))
        assert not trust.quarantined(PEER)
        assert trust.standing(PEER).wrong_rate == pytest.approx(0.05, abs=0.06)


def test_at_the_bound_itself_false_alarms_are_as_rare_as_promised() -> None:
    audits = []
    for seed in range(60):
        trust, rng = Trust(OWN, bound=0.1, base=BASE), np.random.default_rng(seed)
        audits.append(next(n for n in count(1) if trust.note(PEER, wrong=rng.random() < 0.1)))
    assert np.mean(audits) > 1000


def test_own_entries_are_audited_at_the_base_rate_and_stay() -> None:
    trust = Trust(OWN, bound=0.1, base=BASE)
    assert trust.audit_rate([OWN]) == trust.audit_rate([]) == BASE
    for _ in range(100):
        assert not trust.note(OWN, wrong=True)
    assert trust.audit_rate([OWN]) == BASE
    assert trust.standing(OWN).wrong_rate == 1.0


class TestKept:
    def test_quarantine_takes_the_entries_and_survives_a_restart(self, tmp_path: Path) -> None:
        with EntryMemory(tmp_path) as memory:
            memory.add([entry(someone(2), 1), entry(someone(3), 2)])
            trust = Trust(OWN, bound=0.1, base=BASE, records=memory)
            while not trust.note(PEER, wrong=True):
                pass
            found = memory.neighbours(SPACE, key_of(1), TAIL, 8)
            assert {one.origin for one in found} == {someone(3).public}
        with EntryMemory(tmp_path) as memory:
            again = Trust(OWN, bound=0.1, base=BASE, records=memory)
            assert again.quarantined(PEER)
            assert not again.quarantined(someone(3).public)
            memory.add([entry(someone(2), 4)])
            assert all(one.origin != PEER for one in memory.neighbours(SPACE, key_of(4), TAIL, 8))
            memory.clear(origin=PEER)
        with EntryMemory(tmp_path) as memory:
            assert not Trust(OWN, bound=0.1, base=BASE, records=memory).quarantined(PEER)

    def test_restarts_do_not_wash_a_liar_clean(self, tmp_path: Path) -> None:
        audits = 0
        for _ in range(20):
            with EntryMemory(tmp_path) as memory:
                trust = Trust(OWN, bound=0.1, base=BASE, records=memory)
                if trust.quarantined(PEER):
                    break
                audits += 1
                assert trust.audit_rate([PEER]) == 1.0
                trust.note(PEER, wrong=True)
        assert audits <= trust.audits_to_quarantine + 1
