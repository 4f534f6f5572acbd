"""From settled tokens to the policy's threshold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from agent.learn import goals
from agent.learn.goals import Bound, Fixed, Goal, Price, Share
from agent.learn.learner import GOAL, Learner, state_of
from agent.learn.ledger import Ledger
from agent.learn.ledger_store import LedgerReader, LedgerValues
from agent.learn.sample import Sample
from agent.loop import Token
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance
from protocol.rounds import Learned, Level, subject


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Learner]]:
    learners: list[Learner] = []

    def started(goal: Goal = Price(0.3), threshold: float = 0.25, audit: float = 0.02) -> Learner:  # noqa: B008
        for learner in learners:
            learner.close()
        ledger = Ledger(tmp_path / "ledger.db")
        learners[:] = [Learner(ledger, ThresholdPolicy(threshold, audit), goal, "entropy", "model")]
        return learners[0]

    yield started
    for learner in learners:
        learner.close()


def live(learner: Learner, steps: int, seed: int) -> int:
    """The device writes: u is even on [0, 1], the LLM rejects with probability u. Returns how often it was asked."""
    rng, asked = np.random.default_rng(seed), 0
    for at in range(steps):
        u, differs = float(rng.random()), int(rng.random() < 0.5)
        why, propensity, least = learner.policy.decide(u, seed, at)
        if why is Why.KEEP:
            token = Token(0, u, 0.5, Provenance.LOCAL, why, propensity, least, draft=0, p_draft=0.5)
        else:
            asked += 1
            differs = int(rng.random() < u)
            token = Token(differs, u, 0.5, Provenance.CLOUD, why, propensity, least, draft=0, p_draft=0.5, beta=u)
        learner.note(token, at)
    return asked


def test_from_far_too_high_it_learns_its_way_down(start: Callable[..., Learner]) -> None:
    learner = start(threshold=1.0, audit=0.05)
    for turn in range(12):
        live(learner, 500, turn)
        learner.refresh()
    assert learner.policy.threshold == pytest.approx(0.3, abs=0.1)


def test_without_audits_it_never_hears_that_it_is_too_high(start: Callable[..., Learner]) -> None:
    learner = start(threshold=1.0, audit=0.0)
    assert live(learner, 2000, 0) == 0
    learner.refresh()
    assert learner.policy.threshold == 1.0


def test_a_share_is_met(start: Callable[..., Learner]) -> None:
    learner = start(Share(0.1))
    live(learner, 2000, 0)
    learner.refresh()
    asked = live(learner, 4000, 1)
    assert asked / 4000 == pytest.approx(0.1, abs=0.02)


def test_a_bound_begins_with_asking_everything(start: Callable[..., Learner]) -> None:
    learner = start(Bound(0.05, 0.9))
    learner.refresh()
    assert learner.policy.threshold == 0.0
    for turn in range(6):
        live(learner, 1000, turn)
        learner.refresh()
    assert 0.1 < learner.policy.threshold < 0.32, "R(tau) = tau^2 / 2 here, which is 0.05 at 0.32"


def test_a_fixed_threshold_stays_and_is_nobody_elses_business(start: Callable[..., Learner]) -> None:
    learner = start(Fixed(0.4), threshold=0.4)
    live(learner, 1000, 0)
    assert learner.refresh() is None
    assert learner.policy.threshold == 0.4


def test_a_goal_that_is_set_goes_before_the_configured_one(start: Callable[..., Learner], tmp_path: Path) -> None:
    learner = start(Price(0.3))
    live(learner, 3000, 0)
    learner.refresh()
    before, subject = learner.policy.threshold, learner.subject
    with closing(LedgerValues(tmp_path / "ledger.db")) as values:  # as another process does
        values.put(GOAL, json.dumps(goals.plain(Price(0.7))).encode())
    learner.refresh()
    assert learner.policy.threshold > before + 0.2
    assert learner.subject != subject, "its threshold is not to be averaged with theirs"
    assert start(Price(0.3)).goal == Price(0.7), "it survives a restart"
    with closing(LedgerValues(tmp_path / "ledger.db")) as values:
        values.put(GOAL, b"")
    assert start(Price(0.3)).goal == Price(0.3)


@pytest.mark.parametrize("damaged", [b"{", b"[]", b'{"kind":"price"}', b"\xff\x00", b'{"kind":"price","price":7}'])
def test_a_goal_that_cannot_be_read_is_not_followed(
    start: Callable[..., Learner], tmp_path: Path, damaged: bytes
) -> None:
    learner = start(Price(0.3))
    with closing(LedgerValues(tmp_path / "ledger.db")) as values:
        values.put(GOAL, damaged)
    learner.refresh()
    assert learner.goal == Price(0.3)


def test_it_goes_on_where_it_ended(start: Callable[..., Learner], tmp_path: Path) -> None:
    learner = start()
    live(learner, 2000, 0)
    learner.heed({learner.subject: Learned(Level(0.6, 100.0, 5))})
    threshold = learner.policy.threshold
    assert threshold != 0.25
    again = start()
    assert again.policy.threshold == threshold
    with closing(LedgerReader(tmp_path / "ledger.db")) as ledger:
        state = state_of(ledger.get)
    assert state is not None
    assert state.threshold == threshold
    assert state.agreed == Learned(Level(0.6, 100.0, 5))


def test_what_was_learned_for_one_goal_is_not_taken_for_another(start: Callable[..., Learner]) -> None:
    learner = start(Price(0.3))
    learner.heed({learner.subject: Learned(Level(0.9, 1e6, 50))})
    assert learner.policy.threshold == pytest.approx(0.9)
    other = start(Price(0.2))
    other.refresh()
    assert other.policy.threshold == pytest.approx(0.25)


def test_a_disk_that_refuses_does_not_stop_learning(
    start: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from protocol.errors import StoreError

    learner = start()

    def refuse(name: str, value: bytes) -> None:
        raise StoreError("the ledger cannot be written: disk full")

    live(learner, 2000, 0)
    monkeypatch.setattr(learner.ledger, "put", refuse)
    learner.refresh()
    assert learner.policy.threshold != 0.25
    learner.refresh()
    assert caplog.text.count("disk full") == 1, "said once"
    monkeypatch.undo()


def test_a_ledger_that_cannot_be_read_leaves_everything_as_it_was(
    start: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    from protocol.errors import StoreError

    learner = start()

    def refuse(*_: object) -> None:
        raise StoreError("the ledger cannot be read: disk I/O error")

    live(learner, 2000, 0)
    for reads in ("sample", "get"):
        with monkeypatch.context() as broken:
            broken.setattr(learner.ledger, reads, refuse)
            found = learner.refresh()
            assert found is not None
            assert (found.threshold, learner.policy.threshold) == (0.25, 0.25)
    learner.refresh()
    assert learner.policy.threshold != 0.25, "what came in meanwhile is not lost"
    learner.close()
    learner.close()


def test_a_step_is_noted_with_the_policy_that_decided_it(start: Callable[..., Learner]) -> None:
    learner = start(audit=0.02)
    kept = Token(0, 0.1, 0.5, Provenance.LOCAL, *learner.policy.decide(0.1, 0, 0))
    sent = Token(0, 0.9, 0.5, Provenance.CLOUD, *learner.policy.decide(0.9, 0, 1), draft=0, beta=0.5)
    assert kept.why is Why.KEEP
    learner.policy.threshold = 0.0  # set in mid-answer, before the two are settled
    learner.note(kept, 0)
    learner.note(sent, 1)
    assert learner.ledger.sample().least.tolist() == [0.02], "a difference in the kept step would not have been seen"


def test_what_others_learned_for_another_goal_is_at_hand_when_that_is_set(
    start: Callable[..., Learner], tmp_path: Path
) -> None:
    learner = start(Price(0.3))
    other = subject("entropy", "model", Price(0.1).name)
    learner.heed({learner.subject: Learned(Level(0.6, 1e6, 50)), other: Learned(Level(0.1, 1e6, 50))})
    assert learner.policy.threshold == pytest.approx(0.6)
    with closing(LedgerValues(tmp_path / "ledger.db")) as values:
        values.put(GOAL, json.dumps(goals.plain(Price(0.1))).encode())
    found = learner.refresh()
    assert learner.policy.threshold == pytest.approx(0.1)
    assert found is not None
    assert (found.subject, found.agreed) == (other, pytest.approx(0.1))


def test_a_full_ledger_is_read_again_when_enough_is_new(
    start: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = start(threshold=0.0)  # everything is asked
    live(learner, 3000, 0)
    learner.refresh()
    read: list[int] = []
    sample = learner.ledger.sample

    def counted() -> Sample:
        read.append(1)
        return sample()

    monkeypatch.setattr(learner.ledger, "sample", counted)
    live(learner, 10, 1)
    learner.refresh()
    assert not read, "ten steps say little beside three thousand"
    live(learner, 100, 2)
    learner.refresh()
    learner.refresh()
    assert read == [1]
    learner.heed({learner.subject: Learned(Level(0.6, 100.0, 5))})
    assert read == [1, 1], "what others learned is heeded at once"
