"""`skerry models fit` as a person runs it, with SmolLM2 and no other model on the device."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from models import latency
from models.fingerprint import fingerprint
from protocol.errors import UnknownModel
from tools.commands.models.fit import fit_models


class Command:
    def __init__(self, home: Path, smollm2: Path) -> None:
        models = home / "models"
        models.mkdir()
        (models / smollm2.name).symlink_to(smollm2)
        self.device = home / "device"
        self._env = {
            "SKERRY_MODELS": str(models),
            "XDG_CONFIG_HOME": str(home / "config"),
            "SKERRY_DEVICE_FOLDER": str(self.device),
            "SKERRY_MODEL_THREADS": "1",
        }

    def run(self, *arguments: str) -> Result:
        return CliRunner(env=self._env).invoke(fit_models, arguments)

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        result = self.run(*arguments, "--json")
        assert result.exit_code == code, result.output
        said = json.loads(result.stdout)
        assert isinstance(said, dict)
        return said


@pytest.fixture
def command(tmp_path: Path, smollm2: Path) -> Command:
    return Command(tmp_path, smollm2)


def test_what_is_here_is_measured_once_and_the_table_is_kept(command: Command, smollm2: Path) -> None:
    arguments = ("--model", "smollm2-135m", "--context", "128", "--tok-s", "0.1")
    first = command.run(*arguments)
    assert first.exit_code == 0, first.output
    assert "smollm2-135m: after 64 tokens: writes" in first.stderr
    assert "measured   take this" in first.stdout
    table = latency.load(command.device, fingerprint(smollm2), 1)
    assert table is not None
    assert [point.context for point in table.points] == [64, 112]
    assert table.engine == "gguf"

    again = command.run(*arguments)
    assert (again.stderr, again.exit_code) == ("", 0)
    assert latency.load(command.device, fingerprint(smollm2), 1) == table
    assert "measuring" in command.run(*arguments, "--again").stderr


def test_the_last_lines_are_the_configuration(command: Command) -> None:
    said = command.run("--board", "pi4", "--model", "smollm2-135m").stdout
    section = tomllib.loads(said[said.index("[model]") :])["model"]
    assert section == {"name": "smollm2-135m", "context": 4096, "threads": 0, "kv": "q8_0", "repack": False}


def test_a_named_board_is_estimated_and_nothing_is_measured(command: Command) -> None:
    said = command.json("--board", "pi5", "--tok-s", "15")
    assert {row["speed"] for row in said["models"]} == {"estimated"}
    assert said["taken"] == said["settings"]["name"] == "qwen2.5-coder-0.5b"
    refused = said["models"][0]
    assert refused["model"] == "qwen2.5-coder-1.5b"
    assert "too slow" in refused["problems"][0]
    assert not command.device.exists()


def test_what_has_no_room_is_not_loaded(command: Command) -> None:
    said = command.json("--memory", "200", "--model", "smollm2-135m", code=1)
    assert said["taken"] is None
    assert "too large by" in said["models"][0]["problems"][0]
    assert said["nearest"]["changes"][0].startswith("--memory ")
    assert not command.device.exists()


def test_none_that_fits_is_an_exit_code_and_a_way_out(command: Command) -> None:
    result = command.run("--board", "pi4", "--memory", "200")
    assert result.exit_code == 1
    assert "None fits. The nearest is smollm2-135m: it would with --memory" in result.stdout


def test_a_path_is_a_candidate_too(command: Command, smollm2_q2: Path) -> None:
    said = command.json("--board", "pi4", "--model", str(smollm2_q2), "--model", "smollm2-135m")
    assert [row["model"] for row in said["models"]] == ["smollm2-135m", str(smollm2_q2)], "more bits are better"


def test_an_unknown_model_is_named(command: Command) -> None:
    assert isinstance(command.run("--model", "nonsense").exception, UnknownModel)
