"""A threshold for the bare model and one for each adapter: what was seen of one says nothing of another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.learn import goals
from agent.learn.goals import Price, Share
from agent.learn.learner import GOAL, Learner
from agent.learn.learners import Learners, ledger_beside
from agent.learn.ledger import Ledger
from agent.loop import Token
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance
from protocol.rounds import subject

HOUSE, GARDEN = "11" * 32, "22" * 32


@pytest.fixture
def learners(tmp_path: Path) -> Iterator[Learners]:
    bare = Learner(Ledger(tmp_path / "ledger.db"), ThresholdPolicy(0.4, 0.02), Price(0.3), "entropy", "model")
    learners = Learners(bare)
    yield learners
    learners.close()
    bare.close()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {id: tmp_path / f"{id}.gguf" for id in (HOUSE, GARDEN)}


def live(learners: Learners, adapter: str | None, beta: float, steps: int = 400) -> None:
    """Every step is sent; the LLM rejects with probability `beta`, however sure the SLM is."""
    for at in range(steps):
        u = (at + 0.5) / steps
        token = Token(int(at < beta * steps), u, 0.5, Provenance.CLOUD, Why.ESCALATE, 1.0, 1.0, draft=0, beta=beta)
        token.adapter = adapter
        learners.note(token, 0)


def test_each_learns_from_its_own_steps(learners: Learners, files: dict[str, Path]) -> None:
    learners.follow(files)
    live(learners, "", 0.9)  # the bare model is nearly always wrong, with the adapter nearly never
    live(learners, HOUSE, 0.01)
    learners.refresh()
    assert learners.bare.policy.threshold < 0.1
    assert learners.policy_of(HOUSE).threshold > 0.9
    assert learners.policy_of(GARDEN).threshold == pytest.approx(0.4)


def test_of_a_mix_and_of_what_is_not_in_use_nothing_is_noted(learners: Learners, files: dict[str, Path]) -> None:
    learners.follow({HOUSE: files[HOUSE]})
    live(learners, None, 0.9)
    live(learners, GARDEN, 0.9)
    learners.refresh()
    assert learners.bare.policy.threshold == learners.policy_of(HOUSE).threshold == 0.4
    assert not len(learners.bare.ledger.sample())
    assert learners.policy_of(GARDEN) is learners.bare.policy


def test_a_successor_begins_with_the_threshold_of_the_one_whose_place_it_takes(
    learners: Learners, files: dict[str, Path]
) -> None:
    learners.follow({HOUSE: files[HOUSE]})
    assert learners.policy_of(HOUSE).threshold == 0.4, "the first one begins with the bare model's"
    live(learners, HOUSE, 0.01)
    learners.refresh()
    learned = learners.policy_of(HOUSE).threshold
    assert learned > 0.9
    learners.follow({GARDEN: files[GARDEN]})
    assert learners.policy_of(GARDEN).threshold == learned
    assert not len(learners.bare.ledger.sample()), "and not with its evidence"


def test_a_learner_alone_leaves_out_what_adapters_wrote(tmp_path: Path, learners: Learners) -> None:
    live(learners, "", 0.2, steps=10)
    for adapter in (HOUSE, None):
        token = Token(1, 0.5, 0.5, Provenance.CLOUD, Why.ESCALATE, adapter=adapter)
        learners.bare.note(token, 0)
    assert len(learners.bare.ledger.sample()) == 10


def test_the_subject_is_the_model_with_the_adapter(learners: Learners, files: dict[str, Path]) -> None:
    name = learners.bare.goal.name
    assert learners.bare.subject == subject("entropy", "model", name)
    with_house = Learner(
        Ledger(ledger_beside(files[HOUSE])), ThresholdPolicy(0.4), Price(0.3), "entropy", "model", HOUSE
    )
    assert with_house.subject == subject("entropy", f"model+{HOUSE}", name) != learners.bare.subject
    with_house.close()


def test_who_comes_back_knows_what_it_learned(learners: Learners, files: dict[str, Path]) -> None:
    learners.follow(files)
    live(learners, HOUSE, 0.01)
    learners.refresh()
    learned = learners.policy_of(HOUSE).threshold
    learners.follow({})
    assert learners.policy_of(HOUSE) is learners.bare.policy
    learners.follow(files)
    assert learners.policy_of(HOUSE).threshold == learned > 0.9


def test_a_goal_that_is_set_holds_for_all(learners: Learners, files: dict[str, Path]) -> None:
    learners.follow(files)
    live(learners, HOUSE, 0.01)
    learners.bare.ledger.put(GOAL, json.dumps(goals.plain(Share(0.25))).encode())
    learners.refresh()
    live(learners, HOUSE, 0.01)
    learners.refresh()
    assert learners.policy_of(HOUSE).threshold == pytest.approx(0.75, abs=0.05)


def test_a_ledger_that_cannot_be_opened_stops_nobody(learners: Learners, files: dict[str, Path]) -> None:
    ledger_beside(files[HOUSE]).mkdir()
    learners.follow(files)
    assert learners.policy_of(HOUSE) is learners.bare.policy
    assert learners.policy_of(GARDEN) is not learners.bare.policy
