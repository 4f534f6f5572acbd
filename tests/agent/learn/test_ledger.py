from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from agent.learn.ledger import Ledger
from agent.learn.ledger_rows import Features, Outcome, Row
from agent.learn.ledger_store import LedgerReader, LedgerValues
from protocol.errors import StoreError
from tests.agent.learn.ledgers import row


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.db"


def fill(ledger: Ledger, rows: int) -> None:
    for number in range(rows):
        ledger.passed(0.1, 0.02)
        ledger.passed(0.2, 0.02)
        ledger.note(row(number, u=number / rows))


def test_what_was_noted_is_there_at_once_and_after_a_restart(path: Path) -> None:
    ledger = Ledger(path)
    fill(ledger, 100)
    before, seen = ledger.sample(), ledger.seen()
    ledger.close()
    again = Ledger(path)
    after = again.sample()
    assert len(before) == 100
    assert before.steps == 300
    for name in ("u", "beta", "propensity", "differs", "kept", "least"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert np.array_equal(seen.counts, again.seen().counts)
    assert seen.total == pytest.approx(300, rel=0.01)
    assert seen.above(0.15) < 0.67
    again.close()


def test_every_field_of_a_row_is_kept(path: Path) -> None:
    ledger = Ledger(path)
    ledger.passed(0.1, 0.05)
    ledger.note(Row(0.4, 0.5, 0.125, Outcome.DIFFERED, 0.75, 3, Features(0.5, 7, 0.25)))
    ledger.note(Row(0.6, 1.0, 0.125, Outcome.PEER, None, 0, Features(math.nan)))
    ledger.close()
    with sqlite3.connect(path) as db:
        found = db.execute("SELECT * FROM rows ORDER BY id").fetchall()
        names = [column[1] for column in db.execute("PRAGMA table_info(rows)")]
    assert [dict(zip(names, values, strict=True)) for values in found] == [
        {"id": 1, "u": 0.4, "beta": 0.75, "propensity": 0.5, "least": 0.05, "outcome": "differed", "kept": 1, "cost": 3}
        | {"p": 0.5, "position": 7, "reply_seconds": 0.25},
        {"id": 2, "u": 0.6, "beta": None, "propensity": 1.0, "least": 0.125, "outcome": "peer", "kept": 0, "cost": 0}
        | {"p": None, "position": None, "reply_seconds": None},
    ]


def test_the_oldest_rows_go_first(path: Path) -> None:
    ledger = Ledger(path, rows=50)
    for start in range(0, 120, 30):
        for number in range(start, start + 30):
            ledger.note(row(u=number / 200))
        if start % 60:
            ledger.flush()
        assert len(ledger.sample()) == min(50, start + 30)
    assert ledger.sample().u.tolist() == [number / 200 for number in range(70, 120)]
    ledger.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM rows").fetchone() == (50,)


def test_an_outage_does_not_push_out_what_was_learned(path: Path) -> None:
    ledger = Ledger(path, rows=50)
    fill(ledger, 30)
    for number in range(500):
        ledger.note(row(number, Outcome.FALLBACK if number % 2 else Outcome.MEMORY, beta=None))
        if number % 100 == 0:
            ledger.flush()
    assert len(ledger.sample()) == 30
    ledger.close()
    with sqlite3.connect(path) as db:
        counts = dict(db.execute("SELECT outcome IN ('agreed', 'differed'), count(*) FROM rows GROUP BY 1"))
    assert counts == {0: 50, 1: 30}


def test_what_lay_before_a_forgotten_answer_does_not_count_for_the_next(path: Path) -> None:
    ledger = Ledger(path, rows=10)
    for number in range(40):
        ledger.passed(0.1, 0.02)
        ledger.note(row(number, Outcome.MEMORY if number % 5 == 4 else Outcome.AGREED))
        ledger.flush()
    assert ledger.sample().kept.tolist() == [1, 1, 2, 1, 1, 1, 2, 1, 1, 1]
    ledger.close()


def test_kept_steps_are_counted_across_a_restart(path: Path) -> None:
    ledger = Ledger(path)
    ledger.note(row())
    for _ in range(5):
        ledger.passed(0.3, 0.01)
    ledger.close()
    again = Ledger(path)
    again.passed(0.3, 0.5)
    again.note(row())
    sample = again.sample()
    assert sample.kept.tolist() == [0, 6]
    assert sample.least.tolist() == [0.02, 0.01]
    again.close()


def test_what_makes_no_sense_is_refused_and_counted(path: Path) -> None:
    ledger = Ledger(path)
    ledger.passed(math.nan, 0.02)
    ledger.passed(0.5, 0.02)
    ledger.note(row(u=math.inf))
    ledger.note(row(beta=-1.0))
    ledger.note(row())
    assert ledger.sample().kept.tolist() == [0], "what it stood for is not known"
    assert ledger.refused == 2
    assert ledger.seen().total == pytest.approx(2, rel=1e-3)
    ledger.close()


def test_values_are_kept_and_set_from_outside_while_the_agent_runs(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.get("goal") is None
    ledger.put("goal", b"one")
    outside = LedgerValues(path)
    assert outside.get("goal") == b"one"
    outside.put("goal", b"two")
    assert ledger.get("goal") == b"two"
    fill(ledger, 10)
    assert ledger.flush()
    outside.put("goal", b"three")
    outside.close()
    ledger.close()
    again = Ledger(path)
    assert again.get("goal") == b"three"
    assert len(again.sample()) == 10
    again.close()


def test_a_goal_can_be_set_before_an_agent_ever_ran(path: Path) -> None:
    values = LedgerValues(path)
    values.put("goal", b"first")
    values.close()
    ledger = Ledger(path)
    assert ledger.get("goal") == b"first"
    ledger.close()


def test_others_read_beside_the_agent_and_after_it(path: Path) -> None:
    with pytest.raises(StoreError, match="no ledger yet"):
        LedgerReader(path)
    ledger = Ledger(path)
    fill(ledger, 20)
    ledger.flush()
    reader = LedgerReader(path)
    assert len(reader.sample()) == 20
    fill(ledger, 20)
    ledger.put("state", b"x")
    ledger.flush()
    assert len(reader.sample()) == 40
    assert reader.seen().total == pytest.approx(120, rel=0.01)
    assert reader.get("state") == b"x"
    ledger.close()
    assert len(reader.sample()) == 40
    reader.close()
    late = LedgerReader(path)
    assert len(late.sample()) == 40
    late.close()


def test_no_text_and_no_tokens_reach_the_disk(path: Path) -> None:
    """A token's id would be there as an integer, text as bytes. What is there is known columns and known outcomes."""
    ledger = Ledger(path)
    fill(ledger, 50)
    for outcome in Outcome:
        ledger.note(row(3, outcome))
    ledger.close()
    with sqlite3.connect(path) as db:
        texts, tables = set(), [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for values in db.execute(f'SELECT * FROM "{table}"'):
                texts |= {value for value in values if isinstance(value, str)}
        (integers,) = db.execute("SELECT max(max(kept, cost, position)) FROM rows").fetchone()
    assert set(tables) == {"rows", "seen", "values"}
    assert texts == {outcome.value for outcome in Outcome}
    assert integers < 50, "counts and positions"
    names = {*Row._fields, *Features._fields, "id", "kept"} - {"features"}
    with sqlite3.connect(path) as db:
        assert {column[1] for column in db.execute("PRAGMA table_info(rows)")} == names
