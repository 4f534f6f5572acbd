"""`skerry eval news` and `skerry eval text`: real models on a table of our own, and made-up steps for articles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from protocol.errors import ConfigError
from tests.tools.recorded_steps import decisions
from tools.commands.eval import eval as eval_command
from tools.eval import recordings
from tools.eval.decisions import Decisions

ROWS = 20
GAMES = ("football", "tennis", "hockey", "rowing", "chess", "golf", "judo", "cricket", "boxing", "sailing")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(eval_command, [str(argument) for argument in arguments])


def table(path: Path, rows: int = ROWS, labels: tuple[str, ...] = ("sport", "cooking")) -> Path:
    lines = ["label,text"]
    for at in range(rows):
        kind = at % len(labels)
        text = (
            f"The {GAMES[at // 2 % 10]} final number {at} was won at last"
            if kind == 0
            else f"Bake the bread {at} times"
        )
        lines.append(f"{labels[kind]},{text}")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def options(smollm2: Path, smollm2_q2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("eval")
    chosen = ["--data", table(folder / "table.csv"), "--cache", folder, "--slm", smollm2_q2, "--llm", smollm2]
    return ["news", *map(str, chosen), "--seeds", "2", "--devices", "10"]


@pytest.fixture(scope="module")
def result(options: list[str]) -> Result:
    return run(*options, "--json")


def test_a_table_of_ones_own_is_evaluated(result: Result) -> None:
    assert result.exit_code == 0, result.output
    assert "10 devices would have too few texts each: there are 2" in result.stderr
    found = json.loads(result.stdout)
    assert len(found["arms"]) > 12
    for arm in found["arms"].values():
        assert isinstance(arm["auc"], float)
        for point in arm["points"]:
            assert {"llm_share", "quality", "ci", "bytes_total"} <= point.keys()
    assert "peer_memory" in found["arms"]
    assert found["data"]["labels"] == ["cooking", "sport"]
    assert found["data"]["requests"] == ROWS
    assert set(found["claims"]) == {
        "federated_reaches_static",
        "personal_beats_global",
        "federated_beats_alone",
        "head_beats_scalar",
    }
    assert [pair["slm"] for pair in found["pairs"]] == [found["slm"]]


def test_a_second_run_needs_no_model_and_says_the_same(
    result: Result, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(recordings, "GgufEngine", refuse)
    again = run(*options, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(result.stdout)


def test_too_little_is_refused_with_a_reason(options: list[str], tmp_path: Path) -> None:
    few = run(*options, "--data", table(tmp_path / "few.csv", rows=10))
    assert isinstance(few.exception, ConfigError)
    assert "10 requests about 10 texts are too few" in str(few.exception)
    single = run(*options, "--data", table(tmp_path / "single.csv", labels=("sport",)))
    assert isinstance(single.exception, ConfigError)
    assert "one label" in str(single.exception)


def test_several_small_models_are_also_mixed_in_one_fleet(
    monkeypatch: pytest.MonkeyPatch, smollm2: Path, smollm2_q2: Path, tmp_path: Path
) -> None:
    def made_up(small: recordings.Model, large: recordings.Model, *args: Any) -> Decisions:
        return decisions(40, steps=4, slm=small.path.stem, by_label=0.2 if small.path == smollm2 else -0.2)

    monkeypatch.setattr("tools.eval.data.articles", lambda cache, seed: [])
    monkeypatch.setattr("tools.eval.text.decisions", made_up)
    plot = tmp_path / "text.png"
    slms = ["--slm", smollm2_q2, "--slm", smollm2, "--llm", smollm2]
    command = ["text", *slms, "--seeds", "1", "--devices", "4", "--cache", tmp_path, "--plot", plot]
    shown = run(*command)
    assert shown.exit_code == 0, shown.output
    mixed = f"{smollm2_q2.stem} + {smollm2.stem}"
    assert [line.partition(" with ")[0] for line in shown.stdout.splitlines() if " with large" in line] == [
        smollm2_q2.stem,
        smollm2.stem,
        mixed,
    ]
    assert "federated, similar devices, personal" in shown.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size < 150_000
