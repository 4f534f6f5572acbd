"""The chain of help over a real memory: what the cloud says is known from then on, and evidence is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.chain import Chain
from agent.link.identity import Identity
from agent.memory.keeper import Keeper, recall_evidence
from agent.memory.memory import EntryMemory
from agent.memory.rule_evidence import Evidence
from agent.resolver import Provenance, Question
from tests.agent.chains import (
    SPACE,
    Case,
    cloud,
    hidden,
    keeper_of,
    opened,
    recalled,
    step,
)
from tests.agent.scripted import Clock, Scripted, ScriptedResolver, says


def test_what_the_cloud_said_once_is_known_from_then_on(keeper: Keeper) -> None:
    case, llm = Case(hidden(1)), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, cloud=llm))
    first = step(conversation, case.question())
    second = step(conversation, case.question())
    assert first is not None
    assert second is not None
    assert (first.provenance, second.provenance) == (Provenance.CLOUD, Provenance.MEMORY)
    assert list(second.tokens) == [7]
    assert len(llm.opened[0].questions) == 1
    assert keeper.memory.stats().entries == 1


def test_a_step_of_another_kind_is_not_answered(keeper: Keeper) -> None:
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), Case(hidden(1)).question())
    far = Case(hidden(2), recent=(9,) * 8)
    assert opened(Chain(keeper)).known(far.question()) is None


def test_what_the_model_finds_implausible_is_not_said(keeper: Keeper) -> None:
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())
    question = case.question()
    assert question.state is not None
    question.state.logits[7] = -20.0
    assert opened(Chain(keeper)).known(question) is None


def test_an_audit_of_the_threshold_goes_to_the_cloud_whatever_is_known(keeper: Keeper) -> None:
    case, llm = Case(hidden(1)), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, cloud=llm))
    step(conversation, case.question())
    case.audit = True
    reply = step(conversation, case.question())
    assert reply is not None
    assert reply.provenance is Provenance.CLOUD


def test_if_the_cloud_does_not_answer_the_hit_stands(memory: EntryMemory, me: Identity, tmp_path: Path) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())

    class Silent(ScriptedResolver):
        def open(self, *args: object) -> Scripted:
            return Scripted(lambda question: None, Clock(), prompt=True)

    reply = step(opened(Chain(keeper, cloud=Silent(lambda question: None))), case.question())
    assert reply is not None
    assert (list(reply.tokens), reply.provenance) == ([7], Provenance.MEMORY)


def test_no_cloud_to_audit_with_is_no_reason_to_forget(memory: EntryMemory, me: Identity, tmp_path: Path) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())
    reply = recalled(keeper, case)
    assert reply is not None
    assert list(reply.tokens) == [7]


def test_an_entry_that_proves_wrong_is_believed_less_than_what_was_said_instead(
    memory: EntryMemory, me: Identity, tmp_path: Path
) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    case = Case(hidden(1))
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    step(conversation, case.question())
    corrected = opened(Chain(keeper, cloud=cloud(lambda question: 11)))
    step(corrected, case.question())
    (wrong,) = [n for n in memory.neighbours(SPACE, keeper.keys.key(case.hidden), b"t" * 8, 8) if n.token == 7]
    assert wrong.trust < 1.0
    reply = recalled(keeper, case)
    assert reply is not None
    assert list(reply.tokens) == [11]


def test_the_llms_own_choice_is_kept_not_what_was_drawn(keeper: Keeper) -> None:
    drawn = ScriptedResolver(lambda question: says(4, {7: 0.6, 4: 0.3}))
    step(opened(Chain(keeper, cloud=drawn)), Case(hidden(1)).question())
    (found,) = keeper.memory.neighbours(SPACE, keeper.keys.key(hidden(1)), b"t" * 8, 1)
    assert found.token == 7
    assert found.p == pytest.approx(0.6)


def test_the_same_lesson_twice_is_one_entry(memory: EntryMemory, me: Identity, tmp_path: Path) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=1.0)
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    for _ in range(5):
        step(conversation, Case(hidden(1)).question())
    assert memory.stats().entries == 1


def test_evidence_outlives_the_program(keeper: Keeper, tmp_path: Path) -> None:
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    for seed in range(40):
        step(conversation, Case(hidden(seed), recent=(seed,) * 8).question())
    keeper.save()
    assert recall_evidence(tmp_path / "evidence", 0.1).to_bytes() == keeper.evidence.to_bytes()


def test_damaged_evidence_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "evidence").write_bytes(b"\xc1 rubbish")
    assert recall_evidence(tmp_path / "evidence", 0.1).to_bytes() == Evidence(0.1).to_bytes()


def test_an_engine_without_hidden_states_goes_straight_to_the_cloud(keeper: Keeper) -> None:
    question = Case(hidden(1)).question()
    blind = Question(question.answer, question.draft, question.x)
    llm = cloud(lambda question: 7)
    reply = step(opened(Chain(keeper, cloud=llm)), blind)
    assert reply is not None
    assert reply.provenance is Provenance.CLOUD
    assert keeper.memory.stats().entries == 0


def test_a_device_that_knows_nothing_of_its_hits_yet_audits_them(
    memory: EntryMemory, me: Identity, tmp_path: Path
) -> None:
    keeper = keeper_of(memory, me, tmp_path, audits=0.0)
    keeper.bare.evidence = Evidence(0.1)
    llm = cloud(lambda question: len(question.answer) % 29)
    conversation = opened(Chain(keeper, cloud=llm))
    cases = [Case(hidden(seed), position=seed) for seed in range(200)]
    for case in cases:
        step(conversation, case.question())
    asked = len(llm.opened[0].questions)
    said = [step(conversation, case.question()) for case in cases]
    audits = len(llm.opened[0].questions) - asked
    assert said[0] is not None
    assert said[0].provenance is Provenance.CLOUD, "the first hit of all"
    assert 10 < audits < 60, "fewer and fewer: about twice the square root"
