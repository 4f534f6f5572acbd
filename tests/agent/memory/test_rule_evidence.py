"""How theta follows from what was seen, and what is reported of it."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.memory.rule_evidence import START, WINDOW, Evidence, upper_bounds
from protocol.errors import ProtocolError


def fill(evidence: Evidence, count: int, score: float, right: bool, *, agree: bool = True) -> None:
    for _ in range(count):
        evidence.note(score, memory_right=right, draft_right=agree and right, agree=agree)


def test_before_there_is_evidence_theta_is_conservative_and_every_hit_is_audited() -> None:
    evidence = Evidence()
    assert evidence.theta == START
    assert evidence.audit_rate == 1.0
    assert evidence.wrong_reuse_rate == (0.0, 1.0)


def test_theta_falls_only_once_that_is_proven() -> None:
    evidence = Evidence(bound=0.1)
    fill(evidence, 16, 0.3, True)  # none of 16 wrong: up to 14 % might be
    assert evidence.theta == START
    fill(evidence, 16, 0.3, True)
    assert evidence.theta == 0.3
    assert evidence.allows(0.3, agree=True)
    assert not evidence.allows(0.3, agree=False)


def test_a_tighter_bound_takes_more_evidence() -> None:
    strict = Evidence(bound=0.02)
    fill(strict, 100, 0.3, True)
    assert strict.theta == START
    fill(strict, 60, 0.3, True)
    assert strict.theta == 0.3


def test_theta_rises_where_memory_is_wrong_too_often_and_no_further() -> None:
    evidence = Evidence()
    fill(evidence, 30, 0.9, True)
    fill(evidence, 30, 0.6, False)
    assert evidence.allows(0.9, agree=True)
    assert not evidence.allows(0.6, agree=True)


def test_theta_recovers_when_the_errors_are_past() -> None:
    evidence = Evidence()
    fill(evidence, 50, 0.95, False)
    assert not evidence.allows(0.95, agree=True)
    fill(evidence, WINDOW, 0.6, True)
    assert evidence.allows(0.6, agree=True)


def test_memory_that_is_right_less_often_than_the_draft_replaces_nothing() -> None:
    evidence = Evidence(bound=0.75)  # so lax that it alone would let this pass
    for number in range(100):
        memory_right = number % 5 < 2
        evidence.note(0.8, memory_right=memory_right, draft_right=not memory_right, agree=False)
    assert evidence.theta <= 0.8
    assert not evidence.allows(0.9, agree=False)
    assert evidence.allows(0.9, agree=True)


def test_what_one_origin_spoilt_is_forgotten_with_it() -> None:
    evidence = Evidence()
    for _ in range(40):
        evidence.note(0.9, memory_right=False, draft_right=False, agree=True, origin=b"bad")
    fill(evidence, 1, 0.9, True)
    assert not evidence.allows(0.9, agree=True)
    evidence.forget(b"bad")
    assert evidence.allows(0.9, agree=True)


def stream(evidence: Evidence, steps: int, base: float, seed: int) -> tuple[int, int]:
    """A memory whose candidates are right with probability `score`: (hits used, of them wrong)."""
    rng = random.Random(seed)
    used = wrong = 0
    for _ in range(steps):
        score, agree = rng.random() ** 0.5, rng.random() < 0.5
        right = rng.random() < score
        if not evidence.allows(score, agree=agree):
            evidence.note(score, memory_right=right, draft_right=agree and right, agree=agree)
            continue
        propensity = max(base, evidence.audit_rate)
        used, wrong = used + 1, wrong + (not right)
        if rng.random() < propensity:
            evidence.note(score, memory_right=right, draft_right=agree and right, agree=agree, propensity=propensity)
    return used, wrong


@pytest.mark.parametrize("bound", [0.05, 0.1, 0.2])
def test_the_rate_of_wrong_reuse_settles_below_the_bound(bound: float) -> None:
    rates = []
    for seed in range(3):
        evidence = Evidence(bound)
        stream(evidence, 4000, 0.05, seed)
        used, wrong = stream(evidence, 2000, 0.05, seed + 100)
        assert used > 100
        rates.append(wrong / used)
    assert np.mean(rates) <= 1.1 * bound  # some hundred hits each: no finer
    assert np.mean(rates) >= bound / 5  # nor is it kept down by using hardly anything


def test_the_reported_rate_is_that_of_the_hits_although_few_are_audited() -> None:
    reported, actual = [], []
    for seed in range(20):
        evidence = Evidence(0.2)
        stream(evidence, 1500, 0.05, seed)
        rate, bound = evidence.wrong_reuse_rate
        assert rate <= bound
        used, wrong = stream(Evidence.from_bytes(evidence.to_bytes(), 0.2), 400, 0.05, seed + 1000)
        reported.append(rate)
        actual.append(wrong / used)
    assert np.mean(reported) == pytest.approx(np.mean(actual), abs=0.04)


def test_audits_grow_fewer_as_evidence_grows() -> None:
    evidence = Evidence()
    fill(evidence, 99, 0.9, True)
    assert evidence.audit_rate == pytest.approx(0.1)
    fill(evidence, 2 * WINDOW, 0.9, True)
    assert evidence.audit_rate == pytest.approx(1 / np.sqrt(1 + WINDOW))


labels = st.tuples(st.floats(0, 1), st.booleans(), st.booleans(), st.booleans(), st.floats(0.01, 1))


@given(st.lists(labels, max_size=60))
def test_what_is_kept_comes_back(noted: list[tuple[float, bool, bool, bool, float]]) -> None:
    evidence = Evidence()
    for score, right, draft_right, agree, propensity in noted:
        evidence.note(score, memory_right=right, draft_right=draft_right, agree=agree, propensity=propensity)
    back = Evidence.from_bytes(evidence.to_bytes())
    assert back.theta == evidence.theta
    assert back.wrong_reuse_rate == evidence.wrong_reuse_rate
    assert back.to_bytes() == evidence.to_bytes()


@given(st.binary(max_size=200))
def test_rubbish_is_refused_in_words(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="learned anew"):
        Evidence.from_bytes(raw)


def test_absurd_labels_are_refused() -> None:
    sound = Evidence()
    sound.note(0.5, memory_right=True, draft_right=True, agree=True, propensity=0.25)
    raw = sound.to_bytes()
    quarter, zero = bytes.fromhex("cb3fd0000000000000"), bytes.fromhex("cb0000000000000000")
    assert quarter in raw
    with pytest.raises(ProtocolError):
        Evidence.from_bytes(raw.replace(quarter, zero))


def test_the_bound_is_wilsons() -> None:
    rates, n = np.array([0.0, 0.1, 0.5]), np.array([24, 100, 10])
    assert upper_bounds(rates, n, 1.6449) == pytest.approx([0.1013, 0.1606, 0.7307], abs=5e-4)


def test_metrics_read_the_rate_while_answers_are_being_learned_from() -> None:
    evidence, done, failed = Evidence(), threading.Event(), []

    def read() -> None:
        while not done.is_set():
            try:
                _ = evidence.wrong_reuse_rate
                evidence.to_bytes()
            except RuntimeError as error:
                failed.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(3000):
        evidence.note(0.9, memory_right=number % 3 > 0, draft_right=False, agree=True, propensity=0.5)
    done.set()
    reader.join()
    assert not failed
