"""`skerry eval privacy`: what it prints follows from the seed, and from what the detector does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.privacy import Detector
from tools.commands.eval import eval
from tools.eval.privacy_data import lookalikes, planted


def run(*arguments: str) -> str:
    done = CliRunner().invoke(eval, ["privacy", "--count", "10", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    one, same, other = (json.loads(run("--json", "--cache", str(tmp_path), "--seed", seed)) for seed in ("3", "3", "4"))
    assert one["data"] == "generated"
    assert one["recall"] == same["recall"]
    assert planted(3, 5) == planted(3, 5) != planted(4, 5)
    assert lookalikes(3, 5) == lookalikes(3, 5) != lookalikes(4, 5)
    assert {row["group"] for row in one["recall"]} == {row["group"] for row in other["recall"]}
    assert "articles" not in one, "nothing is fetched"


def test_numbers_with_check_digits_are_found_and_lookalikes_are_rare(tmp_path: Path) -> None:
    told = json.loads(run("--json", "--cache", str(tmp_path)))
    found = {row["group"]: row["found"] for row in told["recall"]}
    assert all(found[group] >= 0.9 for group in ("email", "card", "iban", "mac address", "api key"))
    assert told["lookalikes"]["per_1000_words"] < 20


def test_a_detector_that_finds_nothing_has_no_recall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Detector, "spans", lambda self, text: [])
    told = json.loads(run("--json", "--cache", str(tmp_path)))
    assert all(row["found"] == row["partly"] == 0.0 for row in told["recall"])
    assert told["lookalikes"]["per_1000_words"] == 0.0


def test_the_table_says_what_it_was_measured_on(tmp_path: Path) -> None:
    assert "on generated data" in run("--cache", str(tmp_path))
