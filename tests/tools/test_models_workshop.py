"""`skerry models export` and `quantize`: a model goes all the way to the catalog, and what users see on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from models.engine.open import open_tokenizer
from models.fingerprint import size_of
from protocol.errors import BadModelFile, ConfigError, SkerryError, UnknownModel, WorkshopError
from tests.models.onnx_folders import write_folder
from tests.models.tiny import VOCAB, Tiny
from tests.models.tiny_hf import write_tiny_hf
from tools.commands.models.export import export_model
from tools.commands.models.quantize import quantize_model
from tools.commands.models.stored import add

TOKENS = ["Ċ", "Ġ", *map(chr, range(33, 33 + VOCAB - 2))]


def run(command: click.Command, home: Path, *arguments: object, **env: str) -> Result:
    places = {"SKERRY_MODELS": str(home / "models"), "XDG_CONFIG_HOME": str(home / "config")}
    return CliRunner(env=places | env).invoke(command, [str(one) for one in arguments])


def parsed(result: Result) -> dict[str, Any]:
    assert result.exception is None, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="module")
def exported(hf: Path) -> tuple[Path, Result]:
    """Made in the same place where a command was killed in the middle before."""
    target = hf.parent / "Tiny ONNX"
    command = [sys.executable, "-c", "from tools.commands.models.export import *; export_model()", str(hf), str(target)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert "exporting with onnxruntime-genai" in process.stderr.readline()
        os.killpg(process.pid, signal.SIGKILL)
    assert not target.exists()
    assert (target.parent / f".{target.name}.{process.pid}").exists()
    result = run(export_model, hf.parent, hf, target)
    assert not list(target.parent.glob(f".{target.name}.*"))  # nor what the killed one left
    return target, result


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return Tiny("llama").write(tmp_path / "tiny.gguf", TOKENS)


def test_an_export_says_what_it_does_and_what_comes_next(exported: tuple[Path, Result]) -> None:
    target, result = exported
    assert result.exception is None, result.output
    steps = [re.sub(r"^ +\d+:\d\d  ", "", line) for line in result.stderr.splitlines()]
    assert steps[0] == "exporting with onnxruntime-genai …"
    assert re.fullmatch(r"against PyTorch: logits_relative_error .*e-\d\d, hidden_relative_error .*", steps[-1])
    assert all(re.match(r" +\d+:\d\d  ", line) for line in result.stderr.splitlines())
    lines = result.stdout.splitlines()
    assert lines[0] == f"{target}: llama, fp32, {size_of(target) / 1e6:,.1f} MB"
    assert lines[1].startswith("  logits relative error: ")
    assert lines[-2].endswith(f"skerry models inspect '{target}'")
    assert lines[-1].endswith(f"skerry models add tiny-onnx --file '{target}'")


def test_from_the_export_to_the_catalog(exported: tuple[Path, Result], tmp_path: Path) -> None:
    source, target = exported[0], tmp_path / "tiny-int4"
    made = parsed(run(quantize_model, tmp_path, source, target, "--to", "int4", "--json"))
    assert (made["path"], made["bytes"]) == (str(target), size_of(target))
    assert (made["action"], made["quantisation"], made["parent"]["action"]) == ("quantize", "int4", "export")
    assert made["bytes"] < size_of(source)
    assert made["tokenizer"] == open_tokenizer(target).fingerprint
    entry = Path(parsed(run(add, tmp_path, "tiny-int4", "--file", target, "--json"))["entry"]).read_text()
    for fact in ('quantisation = "int4"', 'licence = "mit"', 'architecture = "llama"', f'path = "{target}"'):
        assert fact in entry


def test_a_gguf_file_is_quantised(gguf: Path, tmp_path: Path) -> None:
    made = parsed(run(quantize_model, tmp_path, gguf, tmp_path / "small.gguf", "--to", "q8_0", "--json"))
    assert (made["quantisation"], made["bytes"]) == ("Q8_0", (tmp_path / "small.gguf").stat().st_size)
    result = run(quantize_model, tmp_path, tmp_path / "small.gguf", tmp_path / "Smaller!.gguf", "--to", "q4_0")
    assert "  small.gguf is Q8_0: what is rounded twice loses more" in result.stderr
    assert "  bits per weight: " in result.stdout
    assert result.stdout.endswith(f"skerry models add smaller --file '{tmp_path / 'Smaller!.gguf'}'\n")


def test_a_kind_of_the_other_format(gguf: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "onnx")
    fails(ConfigError, "can be quantised to int4, ", quantize_model, tmp_path, folder, tmp_path / "x", "--to", "q4_0")
    fails(ConfigError, "can be quantised to q4_0, ", quantize_model, tmp_path, gguf, tmp_path / "x", "--to", "int4")
    unknown = run(quantize_model, tmp_path, gguf, tmp_path / "x", "--to", "q3")
    assert unknown.exit_code == 2
    assert "'q3' is not one of" in unknown.stderr


def test_sources_that_are_none(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = write_folder(tmp_path / "onnx")
    for error, message, source in (
        (BadModelFile, "not a Hugging Face folder", tmp_path / "empty"),
        (BadModelFile, "in ONNX already; `skerry models quantize`", folder),
        (BadModelFile, "in ONNX already; `skerry models quantize`", folder / "model.onnx"),
        (UnknownModel, "no model 'nothing'", "nothing"),
        (BadModelFile, "run `skerry models pull smollm2-135m`", "smollm2-135m"),
    ):
        fails(error, message, export_model, tmp_path, source, tmp_path / "x")
    fails(
        BadModelFile, "`skerry models export` makes one", quantize_model, tmp_path, hf, tmp_path / "x", "--to", "int4"
    )


def test_without_the_extra(hf: Path, gguf: Path, tmp_path: Path) -> None:
    for package in ("onnxruntime_genai", "optimum", "onnx"):
        (tmp_path / "without" / package).mkdir(parents=True)
        (tmp_path / "without" / package / "__init__.py").write_text(
            f"raise ModuleNotFoundError('No module named {package}')"
        )
    env = {"PYTHONPATH": str(tmp_path / "without")}
    folder = write_folder(tmp_path / "onnx")
    for command, *arguments in (
        (export_model, hf, tmp_path / "x"),
        (export_model, hf, tmp_path / "x", "--exporter", "optimum"),
        (quantize_model, folder, tmp_path / "x", "--to", "int4"),
    ):
        fails(WorkshopError, "pip install 'skerry[export]'", command, tmp_path, *arguments, **env)
    assert run(quantize_model, tmp_path, gguf, tmp_path / "small.gguf", "--to", "q8_0", **env).exception is None


def fails(error: type[SkerryError], message: str, command: Any, home: Path, *arguments: object, **env: str) -> None:
    result = run(command, home, *arguments, **env)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert not (home / "x").exists()
