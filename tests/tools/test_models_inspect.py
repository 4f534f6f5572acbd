"""`skerry models inspect`: what it says of a model, and of what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner, Result

from protocol.errors import BadModelFile, UnknownModel, UnsafePath
from tests.models.onnx_folders import VOCAB, external, model, outputs, tokenizer, value, write_folder
from tests.models.tiny import Tiny
from tools.commands.models.inspect import inspect_model


def run(*arguments: object) -> Result:
    return CliRunner(env={"SKERRY_MODELS": "/nowhere"}).invoke(inspect_model, [str(one) for one in arguments])


def report(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exception is None, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "m")


def test_a_folder_that_has_everything(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    found = report(folder)
    assert (found["format"], found["architecture"], found["context"]) == ("onnx", "llama", 512)
    assert (found["vocab"], found["layers"], found["width"]) == (VOCAB, 2, 8)
    assert (found["tokenizer"], found["tokens"], found["controls"]) == ("BPE", VOCAB - 2, ["<|end|>"])
    assert (found["template"], found["licence"], found["hidden_states"]) == ("works", "apache-2.0", True)
    assert found["cache"] == "shared (GroupQueryAttention)"
    assert found["quantisation"] == "4-bit in blocks of 32"
    assert found["shares"] == [{"type": "float32", "tensors": 3, "values": 10, "bytes": 40}]
    assert found["size"] == sum(path.stat().st_size for path in folder.iterdir())
    assert (found["runs"], found["missing"], found["manifest"]) == (True, [], None)
    assert "Nothing is missing." in run(folder).stdout


def test_what_a_folder_lacks_is_said_with_a_remedy(folder: Path) -> None:
    outs = outputs(hidden_states=None, logits=value("logits", 1, ["b", "t", VOCAB]))
    made = model(outs=outs)
    del made.graph.node[0]  # GroupQueryAttention
    write_folder(folder, made)
    (folder / "chat_template.jinja").unlink()
    (folder / "config.json").unlink()
    found = report(folder)
    assert found["runs"]
    assert (found["cache"], found["template"], found["licence"]) == ("grown", "none", "unknown")
    expected = (
        ("no chat template", "completions work"),
        ("no hidden states", "`skerry models export`"),
        ("for every token of a prompt", "`skerry models export`"),
        ("copies all keys and values", "`skerry models export`"),
        ("how long its context is", "model.context"),
        ("under which licence", "find that out"),
    )
    assert len(found["missing"]) == len(expected)
    for problem, remedy in expected:
        assert any(problem in sentence and remedy in sentence for sentence in found["missing"]), problem
    assert "Missing:\n  - it has no chat template" in run(folder).stdout


def test_what_keeps_a_folder_from_running(folder: Path) -> None:
    write_folder(folder, model(outs=outputs(logits=None)))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}}))
    found = report(folder)
    assert not found["runs"]
    assert "no output logits" in found["missing"][0]
    assert found["missing"][1].startswith("tokenizer.json: has no tokens")
    assert "Skerry cannot run it:" in run(folder).stdout


def test_another_models_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(VOCAB + 9)))
    found = report(folder)
    assert not found["runs"]
    assert "another model's tokenizer" in found["missing"][0]


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__ }}", "{% for", "{{ raise_exception('no') }}"])
def test_a_template_that_fails(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    found = report(folder)
    assert (found["template"], found["runs"]) == ("fails", True)
    assert "the model's chat template" in found["missing"][0]


def test_how_it_was_made(folder: Path) -> None:
    made = {"licence": "MIT", "tools": {"onnx": "1.0"}, "inputs": [{"path": "a", "sha256": "0"}]}
    (folder / "manifest.json").write_text(json.dumps(made))
    found = report(folder)
    assert (found["manifest"], found["licence"]) == (made, "MIT")
    assert 'made: tools     {"onnx": "1.0"}' in run(folder).stdout


def test_the_first_line_of_a_licence_file(folder: Path) -> None:
    (folder / "LICENSE").write_text("\n   Apache License\n   Version 2.0\n")
    assert report(folder)["licence"] == "Apache License"


def test_tensors_are_listed_if_asked(folder: Path) -> None:
    assert "tensors" not in report(folder)
    assert {"name": "w", "type": "float32", "shape": [2, 3], "bytes": 24} in report(folder, "--tensors")["tensors"]
    assert "2 x 3" in run(folder, "--tensors").stdout


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(2)
    writer.add_embedding_length(128)
    writer.add_file_type(0)
    writer.add_license("MIT")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<|end|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}{{ eos_token }}")
    writer.add_tensor("output.weight", Tiny("llama").weights["output"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = report(path)
    assert (found["format"], found["architecture"], found["quantisation"]) == ("gguf", "llama", "F32")
    assert (found["context"], found["layers"], found["width"], found["vocab"]) == (512, 2, 128, 3)
    assert (found["tokenizer"], found["tokens"], found["controls"]) == ("gpt2", 3, ["<|end|>"])
    assert (found["parameters"], found["size"]) == (96 * 128, path.stat().st_size)
    assert (found["template"], found["licence"]) == ("works", "MIT")
    assert found["shares"] == [{"type": "F32", "tensors": 1, "values": 96 * 128, "bytes": 4 * 96 * 128}]
    assert (found["runs"], found["missing"]) == (True, [])


def test_gguf_without_tokenizer(tmp_path: Path) -> None:
    found = report(Tiny("qwen2").write(tmp_path / "x.gguf"))
    assert not found["runs"]
    assert "it has no tokenizer" in found["missing"][0]


def test_a_real_model(smollm2: Path) -> None:
    found = report(smollm2)
    assert (found["architecture"], found["quantisation"], found["licence"]) == ("llama", "Q4_1", "apache-2.0")
    assert (found["context"], found["vocab"], found["tokens"]) == (8192, 49152, 49152)
    assert 134e6 < found["parameters"] < 135e6
    assert (found["template"], found["runs"], found["missing"]) == ("works", True, [])


def test_what_is_damaged_or_hostile_is_an_error(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(Tiny("llama").write(tmp_path / "x.gguf").read_bytes()[:-40])
    error_of(BadModelFile, "is not all there", cut)
    error_of(UnknownModel, "no model 'nothing'", "nothing")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-200])
    error_of(BadModelFile, "not an ONNX model", folder)
    write_folder(folder, model(tensors=[external("w", [1], location="../x.gguf")]))
    error_of(UnsafePath, "not a plain file", folder)


def error_of(kind: type[Exception], message: str, *arguments: object) -> None:
    error = run(*arguments).exception
    assert isinstance(error, kind)
    assert message in str(error)


def test_names_in_a_file_do_not_steer_the_terminal(folder: Path) -> None:
    write_folder(folder, model(tensors=[external("w\x1b[2J", [1], location="w.data")]), **{"w.data": bytes(4)})
    printed = run(folder, "--tensors").stdout
    assert "w\ufffd[2J" in printed
    assert "\x1b" not in printed
