"""The hit rule: who is believed, and when."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.memory.base import Neighbour
from agent.memory.rule import PLAUSIBLE, Candidate, judge
from agent.memory.rule_evidence import Evidence

KEY = np.ones(4, np.int8)
DRAFT = 1


def near(
    id: int, similarity: float, token: int, *, tail: int = 8, trust: float = 1.0, origin: bytes = b"a"
) -> Neighbour:
    return Neighbour(id, similarity, tail, token, 0.9, 1, trust, origin, KEY)


def candidate(*neighbours: Neighbour, x: float = 0.3, evidence: Evidence | None = None) -> Candidate:
    found = judge(neighbours, lambda token: x, DRAFT, evidence or Evidence())
    assert found is not None
    return found


def test_nobody_says_nothing() -> None:
    assert judge([], lambda token: 1.0, DRAFT, Evidence()) is None
    assert judge([near(1, 1.0, 7, trust=0.0)], lambda token: 1.0, DRAFT, Evidence()) is None


def test_the_very_same_step_is_a_hit_whatever_others_say() -> None:
    found = candidate(near(1, 1.0, 7, origin=b"b"), *(near(id, 0.97, 8) for id in range(2, 9)), x=0.01)
    assert (found.token, found.hit, found.supporters, found.origin) == (7, True, (1,), b"b")


def test_of_far_neighbours_many_must_agree() -> None:
    divided = candidate(near(1, 0.85, 7), near(2, 0.84, 8), near(3, 0.83, 9), near(4, 0.82, 10))
    agreed = candidate(*(near(id, 0.86 - id / 100, 7) for id in range(1, 5)))
    assert not divided.hit
    assert agreed.hit
    assert divided.score < agreed.score


def test_many_that_are_nearly_as_near_outvote_one() -> None:
    found = candidate(near(1, 0.85, 7), near(2, 0.84, 8), near(3, 0.84, 8), near(4, 0.83, 8))
    assert found.token == 8
    assert found.supporters == (2, 3, 4)
    assert found.ids.tolist() == [8, 7]
    assert found.p.sum() == np.float32(1.0)


def test_the_content_gate_refuses_what_the_slm_finds_absurd() -> None:
    assert candidate(near(1, 1.0, 7), x=PLAUSIBLE).hit
    assert not candidate(near(1, 1.0, 7), x=PLAUSIBLE / 2).hit


def test_the_less_similar_the_more_the_slm_must_agree() -> None:
    assert candidate(near(1, 1.0, 7), x=0.01).score == candidate(near(1, 1.0, 7), x=0.5).score
    assert candidate(near(1, 0.8, 7), x=0.01).score < 0.6 * candidate(near(1, 0.8, 7), x=0.5).score


def test_other_words_before_it_count_against_it() -> None:
    scores = [candidate(near(1, 0.9, 7, tail=tail)).score for tail in (0, 1, 2, 4, 8)]
    assert scores == sorted(scores)
    assert scores[0] == scores[-1] / 2


def test_an_entry_that_was_wrong_before_counts_less() -> None:
    assert candidate(near(1, 1.0, 7, trust=0.4)).score < 0.5
    assert candidate(near(1, 1.0, 7, trust=0.4), near(2, 1.0, 8)).token == 8


def test_what_would_replace_the_draft_is_held_to_its_own_evidence() -> None:
    evidence = Evidence()
    for _ in range(40):
        evidence.note(0.9, memory_right=False, draft_right=True, agree=False)
    assert not candidate(near(1, 0.95, 7), evidence=evidence).hit
    assert candidate(near(1, 0.95, DRAFT), evidence=evidence).hit


neighbours = st.builds(
    near,
    st.integers(0, 99),
    st.floats(-1.0, 1.0),
    st.integers(0, 3),
    tail=st.sampled_from((0, 1, 2, 4, 8)),
    trust=st.floats(0.0, 1.0),
)


@given(st.lists(neighbours, max_size=8), st.floats(0.0, 1.0))
def test_the_score_never_exceeds_the_similarity_and_a_hit_is_never_below_theta(
    found: list[Neighbour], x: float
) -> None:
    evidence = Evidence()
    result = judge(found, lambda token: x, DRAFT, evidence)
    if result is None:
        assert all(n.trust == 0.0 for n in found)
        return
    assert 0.0 <= result.score <= result.similarity <= 1.0
    assert abs(float(result.p.sum()) - 1.0) < 1e-5
    assert result.token == result.ids[0]
    if result.hit:
        assert result.similarity >= result.score >= evidence.theta
        assert x >= PLAUSIBLE
    tokens = {n.id: n.token for n in found}
    assert all(any(n.id == id and n.token == result.token for n in found) for id in result.supporters), tokens
