"""GGUF files with fewer bits: what comes out, what stands beside it, and what a failure leaves."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from models.engine.gguf import GgufEngine, GgufTokenizer
from models.gguf_header import read_header
from models.workshop import manifest
from models.workshop.job import Job
from models.workshop.quantize import quantize
from protocol.errors import BadModelFile, ConfigError, DiskFull, WorkshopError
from tests.models.tiny import VOCAB, Tiny

TOKENS = ["Ċ", "Ġ", *map(chr, range(33, 33 + VOCAB - 2))]
TEXT = "The capital of France is Paris, and the capital of Germany is"


class Heard:
    """A job of this process, and what it says."""

    def __init__(self, **env: str) -> None:
        self.lines: list[str] = []
        self.job = Job({**os.environ, **env}, self.lines.append)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    return Tiny("llama").write(tmp_path / "from" / "tiny.gguf", TOKENS)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def test_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    heard, target = Heard(), tmp_path / "q8.gguf"
    made = quantize(smollm2, target, "q8_0", heard.job)
    assert read_header(target).quantisation == made.quantisation == "Q8_0"
    assert (made.action, made.architecture, made.licence, made.context) == ("quantize", "llama", "apache-2.0", 8192)
    assert made.tokenizer == GgufTokenizer.open(smollm2).fingerprint
    assert made.inputs == manifest.hashes(smollm2)
    assert made.outputs == manifest.hashes(target)
    assert manifest.read(target) == made
    assert 8.4 < made.checks["bits_per_weight"] < 8.7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q8.gguf", "q8.gguf.manifest.json"]
    assert any("is Q4_1: what is rounded twice loses more" in line for line in heard.lines)
    one, other = (last_logits(path) for path in (smollm2, target))
    assert np.corrcoef(one, other)[0, 1] > 0.99


def last_logits(path: Path) -> np.ndarray:
    engine = GgufEngine(path, context=128, sequences=1, threads=1, hidden=False)
    tokens = engine.tokenizer.encode(TEXT)
    place = engine.open(tokens, len(tokens) - 1)
    (step,) = engine.forward([(place, tokens[-1:])])
    logits = step.logits.copy()
    place.close()
    engine.close()
    return logits


def test_what_it_was_made_of_is_remembered(tiny: Path, into: Path) -> None:
    heard = Heard()
    first = quantize(tiny, into / "q8.gguf", "q8_0", heard.job)
    assert not any("rounded twice" in line for line in heard.lines), "float32 was not rounded before"
    second = quantize(into / "q8.gguf", into / "f16.gguf", "f16", heard.job)
    assert second.parent == first
    assert any("becomes larger, not better" in line for line in heard.lines)


@pytest.mark.parametrize("kind", ["int4", "int8-dynamic", "Q9"])
def test_kinds_of_the_other_format(tiny: Path, into: Path, kind: str) -> None:
    fails(ConfigError, "it can be quantised to q4_0, q4_1, q4_k_m", tiny, into, kind)


def test_what_stands_there_stays(tiny: Path, into: Path) -> None:
    (into / "out.gguf").write_text("precious")
    with pytest.raises(ConfigError, match="is there already"):
        quantize(tiny, into / "out.gguf", "q8_0", Heard().job)
    assert (into / "out.gguf").read_text() == "precious"


def test_the_disk_is_asked_first(tiny: Path, into: Path) -> None:
    job = Job(os.environ, free_space=lambda folder: 1000)
    with pytest.raises(DiskFull, match=r"needs some .* GB"):
        quantize(tiny, into / "out.gguf", "q8_0", job)
    assert not list(into.iterdir())


def test_damaged_sources(tiny: Path, into: Path) -> None:
    whole = tiny.read_bytes()
    tiny.write_bytes(whole[:-40])
    fails(BadModelFile, "is not all there", tiny, into)
    tiny.write_bytes(b"GGUF" + bytes(100))
    fails(BadModelFile, "not a GGUF file", tiny, into)
    tiny.unlink()
    fails(BadModelFile, "cannot be read", tiny, into)


def test_a_model_without_tokenizer(tmp_path: Path, into: Path) -> None:
    fails(BadModelFile, "has no tokenizer", Tiny("llama").write(tmp_path / "bare.gguf"), into)


def test_a_model_that_llama_cpp_does_not_know(tmp_path: Path, into: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonsense")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_tensor("output.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fails(WorkshopError, "unknown model architecture: 'nonsense'", tmp_path / "odd.gguf", into)


def test_a_quantiser_that_the_system_ends(tiny: Path, into: Path, tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)")
    heard = Heard(PYTHONPATH=str(tmp_path / "killed"))
    fails(WorkshopError, "most likely for its memory", tiny, into, heard=heard)


def fails(
    error: type[Exception], message: str, source: Path, into: Path, kind: str = "q8_0", heard: Heard | None = None
) -> None:
    """With this message, and nothing is left."""
    with pytest.raises(error, match=message):
        quantize(source, into / "out.gguf", kind, (heard or Heard()).job)
    assert not list(into.iterdir())
