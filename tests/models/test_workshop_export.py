"""Exports to ONNX: the same as what they were made of, or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.chat import render
from models.engine.gguf import GgufTokenizer
from models.engine.onnx import OnnxEngine
from models.engine.open import open_tokenizer
from models.local_model import facts_of
from models.workshop import export as workshop
from models.workshop import manifest
from models.workshop.export import AGREES, Exporter, export
from models.workshop.inspect import inspect
from models.workshop.job import Job
from models.workshop.manifest import Manifest
from protocol.errors import BadModelFile, ConfigError, DiskFull, WorkshopError
from protocol.resolve import Message
from tests.models.tiny_hf import CONTEXT, write_tiny_hf

TEXT = "Why is the sky blue? 123 naïve 😀"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture(scope="module")
def exported(tiny: Path) -> tuple[Path, Manifest]:
    target = tiny.parent / "onnx"
    return target, export(tiny, target, "genai", Job(os.environ))


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The model's folder, to be spoiled."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_an_export_computes_what_pytorch_computes(tiny: Path, exported: tuple[Path, Manifest]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    engine = OnnxEngine(exported[0], context=CONTEXT, sequences=1, threads=1)
    tokens = engine.tokenizer.encode(TEXT)
    place = engine.open(tokens, 0)
    ours = np.array([engine.forward([(place, [token])])[0].logits.copy() for token in tokens])
    place.close()
    engine.close()
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(tiny)(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(ours - theirs).max() < AGREES * np.abs(theirs).max()
    assert np.abs(theirs).max() > 1


def test_what_an_export_says_of_itself(tiny: Path, exported: tuple[Path, Manifest]) -> None:
    target, made = exported
    assert (made.action, made.architecture, made.quantisation) == ("export", "llama", "fp32")
    assert (made.licence, made.context, made.parameters) == ("mit", CONTEXT, {"exporter": "genai"})
    assert made.checks.keys() == {"logits_relative_error", "hidden_relative_error"}
    assert max(made.checks.values()) <= AGREES
    assert made.inputs == manifest.hashes(tiny)
    assert made.outputs.items() <= manifest.hashes(target).items()
    assert {"onnxruntime-genai", "torch", "transformers"} <= made.tools.keys()
    assert manifest.read(target) == made
    report = inspect(target)
    assert (report.runs, report.missing, report.hidden_states, report.template) == (True, (), True, "works")
    beside = {path.name for path in target.parent.iterdir()} - {"onnx.sha256.json"}
    assert beside == {"hf", "onnx"}, "nothing else is left"


def test_a_catalog_entry_is_made_of_it(exported: tuple[Path, Manifest]) -> None:
    facts = facts_of(exported[0])
    assert {key: facts[key] for key in ("architecture", "quantisation", "licence", "context")} == {
        "architecture": "llama",
        "quantisation": "fp32",
        "licence": "mit",
        "context": CONTEXT,
    }
    assert {"model.onnx", "model.onnx.data", "tokenizer.json"} <= {part["path"] for part in facts["files"]}


@pytest.mark.parametrize("fixture", ["smollm2_onnx", "smollm2_optimum"])
def test_a_gguf_files_export_reads_and_chats_as_the_file(
    smollm2: Path, fixture: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    original, made = GgufTokenizer.open(smollm2), open_tokenizer(folder)
    assert made.fingerprint == original.fingerprint
    assert (made.begin, made.end, made.eog) == (original.begin, original.end, original.eog)
    for text in (TEXT, "<|im_start|>user", "  a\n\n\tb  "):
        assert made.encode(text, start=True) == original.encode(text, start=True)
        assert made.encode(text, special=True) == original.encode(text, special=True)
    messages = [Message("system", "Be brief."), Message("user", TEXT)]
    assert render(made, messages) == render(original, messages)
    known = manifest.read(folder)
    assert known is not None
    assert (known.licence, known.context) == ("apache-2.0", 8192)
    assert max(known.checks.values()) <= AGREES


def test_an_export_that_computes_something_else_is_caught(
    tiny: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = workshop._build

    def tamper(folder: Path, out: Path, exporter: Exporter, job: Job) -> None:
        """One matrix of many is a little larger than it should be."""
        build(folder, out, exporter, job)
        data = out / "model.onnx.data"
        weights = np.fromfile(data, np.float32)
        weights[-64 * 96 :] *= 1.05
        weights.tofile(data)

    monkeypatch.setattr(workshop, "_build", tamper)
    fails(WorkshopError, "computes something else than PyTorch: logits_relative_error", tiny, into)


def test_models_with_code_of_their_own(copy: Path, into: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))
    fails(BadModelFile, "brings code of its own, which is not run", copy, into)


def test_pickled_weights_are_never_read(copy: Path, into: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    fails(BadModelFile, "pickled weights .* are never read", copy, into)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: cannot be read"),
        ("config.json", b"[1]", "config.json: not a JSON object"),
        ("tokenizer.json", None, "tokenizer.json: cannot be read"),
        ("tokenizer.json", b"{", "tokenizer.json: not JSON"),
    ],
)
def test_folders_that_are_no_model(copy: Path, into: Path, name: str, content: bytes | None, message: str) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    fails(BadModelFile, message, copy, into)


def test_damaged_weights(copy: Path, into: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    fails(WorkshopError, r"builder failed \(exit code 1\).*`--exporter optimum` may", copy, into)


def test_files_that_are_no_model(tmp_path: Path, into: Path) -> None:
    (tmp_path / "notes.txt").write_text("buy milk")
    fails(BadModelFile, "not a GGUF file", tmp_path / "notes.txt", into)
    fails(BadModelFile, "cannot be read", tmp_path / "nothing.gguf", into)


def test_what_stands_there_stays(tiny: Path, into: Path) -> None:
    (into / "out").mkdir()
    (into / "out" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="is there already"):
        export(tiny, into / "out", "genai", Job(os.environ))
    assert [path.name for path in (into / "out").iterdir()] == ["precious"]


def test_the_disk_is_asked_first(tiny: Path, into: Path) -> None:
    job = Job(os.environ, free_space=lambda folder: 10**5)
    fails(DiskFull, r"needs some .* GB in .*, 0.0 GB are free", tiny, into, job)


def test_a_place_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkshopError, match="file cannot be written"):
        export(tiny, tmp_path / "file" / "out", "genai", Job(os.environ))


@pytest.mark.parametrize("exporter", ["genai", "optimum"])
def test_an_exporter_that_the_system_ends(tiny: Path, into: Path, tmp_path: Path, exporter: Exporter) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)")
    job = Job({**os.environ, "PYTHONPATH": str(tmp_path)})
    fails(WorkshopError, "the system ended it, most likely for its memory", tiny, into, job, exporter)


def fails(
    error: type[Exception], message: str, source: Path, into: Path, job: Job | None = None, exporter: Exporter = "genai"
) -> None:
    """With this message, and nothing is left."""
    with pytest.raises(error, match=f"(?s){message}"):
        export(source, into / "out", exporter, job or Job(os.environ))
    assert not list(into.iterdir())
