"""Keep, escalate, audit with a fixed threshold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from agent.policy import Policy, ThresholdPolicy, Why
from models.sampling import uniform


@pytest.fixture
def policy() -> Policy:
    return ThresholdPolicy(0.25)


@pytest.mark.parametrize(
    ("u", "why"), [(0.0, Why.KEEP), (0.25, Why.KEEP), (0.2500001, Why.ESCALATE), (1.0, Why.ESCALATE)]
)
def test_escalates_above_the_threshold(policy: Policy, u: float, why: Why) -> None:
    assert policy.decide(u, 0, 0).why is why


def test_extremes() -> None:
    assert ThresholdPolicy(1.0).decide(1.0, 0, 0).why is Why.KEEP
    assert ThresholdPolicy(0.0).decide(1e-9, 0, 0).why is Why.ESCALATE
    assert ThresholdPolicy(0.0).decide(0.0, 0, 0).why is Why.ESCALATE, "0 asks about every token"


def test_propensities(policy: Policy) -> None:
    assert policy.decide(0.9, 0, 0).propensity == 1.0
    assert policy.decide(0.1, 0, 0).propensity == 0.0
    audited = ThresholdPolicy(0.25, audit=0.3)
    assert {audited.decide(0.1, 0, at).propensity for at in range(100)} == {0.3}
    assert audited.decide(0.9, 0, 0).propensity == 1.0


def test_each_decision_says_the_least_propensity_of_any_step() -> None:
    audited = ThresholdPolicy(0.25, audit=0.3)
    assert {audited.decide(u, 0, at).least for u in (0.1, 0.9) for at in range(100)} == {0.3}
    assert ThresholdPolicy(0.0, audit=0.3).decide(0.1, 0, 0).least == 1.0


def test_audits_their_share_at_random() -> None:
    policy, count = ThresholdPolicy(0.25, audit=0.1), 20_000
    audits = np.array([policy.decide(0.1, 7, at).why is Why.AUDIT for at in range(count)])
    assert stats.binomtest(int(audits.sum()), count, 0.1).pvalue > 1e-4
    pairs = int((audits[1:] & audits[:-1]).sum())
    assert stats.binomtest(pairs, count - 1, 0.01).pvalue > 1e-4


def test_every_token_can_be_audited() -> None:
    assert all(ThresholdPolicy(0.25, audit=1.0).decide(0.1, 0, at).why is Why.AUDIT for at in range(100))


def test_the_same_step_is_decided_alike() -> None:
    policy = ThresholdPolicy(0.5, audit=0.5)
    decisions = [policy.decide(0.1, 3, at) for at in range(50)]
    assert [policy.decide(0.1, 3, at) for at in range(50)] == decisions
    assert [policy.decide(0.1, 4, at) for at in range(50)] != decisions


def test_audits_do_not_depend_on_the_token_that_was_drawn() -> None:
    policy = ThresholdPolicy(0.25, audit=0.5)
    audits = [policy.decide(0.1, 1, at).why is Why.AUDIT for at in range(20_000)]
    draws = [uniform(1, at) < 0.5 for at in range(20_000)]
    table = np.histogram2d(audits, draws, bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-4
