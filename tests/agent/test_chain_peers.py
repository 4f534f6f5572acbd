"""The chain of help among peers: who is asked when, and what becomes of those that are wrong."""

from __future__ import annotations

import pytest

from agent.chain import Chain
from agent.link.identity import Identity
from agent.memory.keeper import Keeper
from agent.memory.memory import EntryMemory
from agent.resolver import Provenance
from protocol.memory import Entry, sign_entry
from protocol.resolve import Mode
from tests.agent.chains import (
    SPACE,
    VOCAB,
    Case,
    Peers,
    cloud,
    entry,
    hidden,
    near,
    opened,
    recalled,
    step,
)


def test_it_is_known_without_cloud_and_peers(keeper: Keeper) -> None:
    case = Case(hidden(1))
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), case.question())
    alone = opened(Chain(keeper))
    assert alone.alone
    reply = step(alone, case.question())
    assert reply is not None
    assert list(reply.tokens) == [7]
    assert step(alone, Case(hidden(2)).question()) is None


def test_peers_are_asked_before_the_cloud_and_their_answer_is_enough(keeper: Keeper, other: Identity) -> None:
    case, peers, llm = Case(hidden(1)), Peers(), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, peers, llm))  # type: ignore[arg-type]
    keeper.trust.note(other.public, wrong=False)
    while keeper.trust.audit_rate([other.public]) > 0.02:
        keeper.trust.note(other.public, wrong=False)
    question = case.question()
    assert conversation.known(question) is None
    ticket = conversation.ask(question)
    assert ticket is not None
    assert not ticket.last
    assert not llm.opened[0].questions
    answered = peers.answer(entry(keeper, case, 9, other))
    assert answered.reply is not None
    assert list(answered.reply.tokens) == [9]
    assert answered.reply.provenance is Provenance.PEER
    assert answered.reply.origin == other.public.hex()[:8]


def test_after_the_peers_the_cloud_is_asked(keeper: Keeper) -> None:
    peers, llm = Peers(), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, peers, llm))  # type: ignore[arg-type]
    reply = step(conversation, Case(hidden(1)).question())
    assert reply is not None
    assert reply.provenance is Provenance.CLOUD
    assert len(peers.given_up) == 1
    assert keeper.memory.stats().entries == 1


def test_a_newcomers_first_hit_is_checked_with_the_cloud(keeper: Keeper, other: Identity) -> None:
    case, peers, llm = Case(hidden(1)), Peers(), cloud(lambda question: 7)
    conversation = opened(Chain(keeper, peers, llm))  # type: ignore[arg-type]
    question = case.question()
    assert conversation.known(question) is None
    ticket = conversation.ask(question)
    assert ticket is not None
    assert peers.answer(entry(keeper, case, 9, other)).failed, "its word alone is not enough yet"
    passed_on = conversation.again(ticket)
    assert passed_on is not None
    assert passed_on.reply is not None
    conversation.taken(passed_on)
    assert list(passed_on.reply.tokens) == [7]
    assert keeper.counts["audits wrong"] == 1
    assert keeper.trust.standing(other.public).wrong == 1.0


def test_a_poisoned_peer_says_nothing_and_is_quarantined_within_the_stated_audits(
    keeper: Keeper, memory: EntryMemory, other: Identity
) -> None:
    """Its entries are well-formed and wrong; the cloud is there. No token of it is ever emitted."""
    llm = cloud(lambda question: 7)
    conversation = opened(Chain(keeper, cloud=llm))
    cases = [Case(hidden(seed), position=seed) for seed in range(100, 140)]
    memory.add([entry(keeper, case, 9, other) for case in cases])
    said = [step(conversation, case.question()) for case in cases]
    assert [list(reply.tokens) for reply in said if reply is not None] == [[7]] * len(cases)
    assert keeper.trust.quarantined(other.public)
    assert keeper.counts["audits wrong"] <= keeper.trust.audits_to_quarantine
    assert not [n for case in cases for n in near(memory, keeper, case) if n == other.public]
    memory.add([entry(keeper, Case(hidden(999)), 9, other)])
    assert near(memory, keeper, Case(hidden(999))) != [other.public]


def test_what_was_learned_is_offered_to_peers_signed(keeper: Keeper, me: Identity) -> None:
    shared: list[Entry] = []
    keeper.share = shared.append
    step(opened(Chain(keeper, cloud=cloud(lambda question: 7))), Case(hidden(1)).question())
    (entry,) = shared
    assert (entry.token, entry.origin, entry.space) == (7, me.public, SPACE)
    assert sign_entry(entry, me.sign) == entry


def test_a_liar_does_not_spoil_what_honest_devices_taught(keeper: Keeper, memory: EntryMemory, other: Identity) -> None:
    """Its wrong entries raise the threshold for everybody, but only until it is quarantined."""
    conversation = opened(Chain(keeper, cloud=cloud(lambda question: 7)))
    theta = keeper.evidence.theta
    cases = [Case(hidden(seed), position=seed) for seed in range(100, 140)]
    memory.add([entry(keeper, case, 9, other) for case in cases])
    for case in cases:
        step(conversation, case.question())
    assert keeper.trust.quarantined(other.public)
    assert keeper.evidence.theta == theta
    reply = recalled(keeper, cases[0])
    assert reply is not None
    assert list(reply.tokens) == [7]


def test_a_token_that_this_model_does_not_have_is_ignored(keeper: Keeper, memory: EntryMemory, other: Identity) -> None:
    case = Case(hidden(1))
    memory.add([entry(keeper, case, VOCAB + 5, other)])
    assert opened(Chain(keeper)).known(case.question()) is None


def test_whoever_gave_an_audited_hit_is_judged_by_it(keeper: Keeper, other: Identity) -> None:
    case, peers = Case(hidden(1)), Peers()
    conversation = opened(Chain(keeper, peers, cloud(lambda question: 7)))  # type: ignore[arg-type]
    question = case.question()
    assert conversation.known(question) is None
    ticket = conversation.ask(question)
    assert ticket is not None
    assert peers.answer(entry(keeper, case, 9, other)).failed
    passed_on = conversation.again(ticket)
    assert passed_on is not None
    conversation.taken(passed_on)
    assert keeper.trust.standing(other.public).wrong == 1.0


def test_one_entry_is_one_vote_however_often_a_peer_sends_it(keeper: Keeper, other: Identity, me: Identity) -> None:
    case, peers = Case(hidden(1)), Peers()
    honest, repeated = entry(keeper, case, 7, me), entry(keeper, case, 9, other)
    conversation = opened(Chain(keeper, peers))  # type: ignore[arg-type]
    question = case.question()
    conversation.known(question)
    conversation.ask(question)
    reply = peers.answer(honest, *[repeated] * 7).reply
    assert reply is not None
    assert reply.y_p.tolist() == pytest.approx([0.5]), "one against one"


@pytest.mark.parametrize("mode", ["verify", "fuse"])
def test_in_a_distribution_memory_speaks_for_the_candidate_alone(
    keeper: Keeper, memory: EntryMemory, me: Identity, other: Identity, mode: Mode
) -> None:
    """Whoever is outvoted is not audited, so nothing of what it says may be drawn."""
    case = Case(hidden(1))
    memory.add([entry(keeper, case, 7, me), entry(keeper, case, 9, other)])
    memory.add([entry(keeper, Case(hidden(1) + 1e-4), 7, me)])
    look = keeper.look(case.question(), mode)
    assert look is not None
    if look.reply is not None:
        assert list(look.reply.tokens) == []
        assert list(look.reply.y_ids) == [7]
        assert float(look.reply.y_p.sum()) < 1.0
