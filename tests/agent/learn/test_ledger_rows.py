from __future__ import annotations

import numpy as np
import pytest

from agent.learn.ledger_rows import Columns, Fields, Outcome, Row
from agent.learn.risk import estimate


def fields(outcome: Outcome, kept: int = 0, u: float = 0.5, beta: float | None = 0.25, least: float = 0.02) -> Fields:
    return u, beta, 1.0, least, outcome.value, kept


def test_a_sample_has_the_steps_that_the_llm_answered() -> None:
    rows = [fields(Outcome.AGREED, 3, 0.1, 0.0), fields(Outcome.DIFFERED, 4, 0.9, 0.75)]
    sample = Columns.of(rows).sample()
    assert sample.u.tolist() == [0.1, 0.9]
    assert sample.beta.tolist() == [0.0, 0.75]
    assert sample.differs.tolist() == [False, True]
    assert sample.kept.tolist() == [3, 4]


def test_where_the_llm_tells_no_probability_its_token_decides() -> None:
    rows = [fields(Outcome.AGREED, beta=None), fields(Outcome.DIFFERED, beta=None)]
    assert Columns.of(rows).sample().beta.tolist() == [0.0, 1.0]


def test_what_memory_and_peers_answer_leaves_the_kept_steps_to_the_next() -> None:
    rows = [fields(Outcome.MEMORY, 5, beta=None), fields(Outcome.PEER, 6, beta=None, least=0.01)]
    rows += [fields(Outcome.AGREED, 7), fields(Outcome.MEMORY, 8), fields(Outcome.DIFFERED, 9), fields(Outcome.PEER, 3)]
    sample = Columns.of(rows).sample()
    assert sample.kept.tolist() == [18, 17]
    assert sample.least.tolist() == [0.01, 0.02]


def test_what_nobody_answers_is_missing_with_the_steps_before_it() -> None:
    rows = [fields(Outcome.FALLBACK, 5), fields(Outcome.AGREED, 7), fields(Outcome.FALLBACK, 900)]
    rows += [fields(Outcome.MEMORY, 2), fields(Outcome.AGREED, 1), fields(Outcome.FALLBACK, 900)]
    assert Columns.of(rows).sample().kept.tolist() == [7, 3]


def test_an_outage_in_which_memory_answers_takes_the_steps_before_that_with_it() -> None:
    """An audit of any of the 800 would not have been answered either."""
    rows = [fields(Outcome.AGREED, 7), fields(Outcome.MEMORY, 800), fields(Outcome.FALLBACK, 1)]
    rows += [fields(Outcome.MEMORY, 2), fields(Outcome.AGREED, 3)]
    assert Columns.of(rows).sample().kept.tolist() == [7, 5]


def test_an_outage_does_not_look_like_agreement() -> None:
    """Half of all steps differ, one in ten is audited, and of nine out of ten audits there is no answer."""
    rng = np.random.default_rng(0)
    rows: list[Fields] = []
    kept = 0
    for _ in range(200_000):
        if rng.random() >= 0.1:
            kept += 1
            continue
        answer = Outcome.DIFFERED if rng.random() < 0.5 else Outcome.AGREED
        rows.append((0.2, None, 0.1, 0.1, Outcome.FALLBACK if rng.random() < 0.9 else answer, kept))
        kept = 0
    assert estimate(Columns.of(rows).sample(), 0.5) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("rows", [[], [fields(Outcome.MEMORY, 3)], [fields(Outcome.FALLBACK, 3)] * 2])
def test_without_answers_there_is_no_sample(rows: list[Fields]) -> None:
    assert len(Columns.of(rows).sample()) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"u": float("nan")},
        {"u": -0.1},
        {"u": 1.1},
        {"beta": float("inf")},
        {"beta": 2.0},
        {"propensity": 0.0},
        {"propensity": float("nan")},
        {"least": -1.0},
        {"cost": -1},
    ],
)
def test_rows_that_make_no_sense_are_not_usable(change: dict[str, float]) -> None:
    good = Row(0.5, 1.0, 0.02, Outcome.AGREED, 0.3, 1)
    assert good.usable
    assert not good._replace(**change).usable  # type: ignore[arg-type]
