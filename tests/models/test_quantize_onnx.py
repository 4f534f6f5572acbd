"""Fewer bits for ONNX models: real SmolLM2, both layouts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from models.engine.onnx import OnnxEngine
from models.fingerprint import size_of
from models.model_folder import check_folder
from models.workshop import manifest
from models.workshop.job import Job
from models.workshop.quantize import quantize
from protocol.errors import ConfigError, DiskFull

TEXT = "The capital of France is Paris, and the longest river of the country is the Loire. Once upon a time there was"
KINDS = {"int4": (110e6, 0.6), "mixed": (135e6, 0.75), "int8": (170e6, 0.9), "int8-dynamic": (265e6, 0.7)}
"""Most bytes of the folder, and least agreement with float32 on the next token."""


@pytest.fixture(scope="module")
def expected(smollm2_onnx: Path) -> list[int]:
    return likeliest(smollm2_onnx)


def likeliest(path: Path) -> list[int]:
    """The token that comes out on top after each token of the text."""
    engine = OnnxEngine(path, context=128, sequences=1, threads=1, hidden=False)
    tokens = engine.tokenizer.encode(TEXT)
    place = engine.open(tokens, 0)
    found = [int(engine.forward([(place, [token])])[0].logits.argmax()) for token in tokens]
    engine.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_smaller_and_says_nearly_the_same(
    smollm2_onnx: Path, expected: list[int], tmp_path: Path, kind: str
) -> None:
    target = tmp_path / kind
    made = quantize(smollm2_onnx, target, kind, Job(os.environ))
    most, least = KINDS[kind]
    assert size_of(target) < most
    assert np.mean(np.array(likeliest(target)) == expected) >= least
    assert made == manifest.read(target)
    assert made.quantisation == kind
    assert made.inputs == manifest.hashes(smollm2_onnx)
    assert made.outputs == manifest.hashes(target)
    assert made.parent is not None
    assert made.parent.action == "export"
    assert check_folder(target).hidden
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in target.iterdir())  # the agent is another user


def test_a_grown_cache_stays_one(smollm2_optimum: Path, expected: list[int], tmp_path: Path) -> None:
    quantize(smollm2_optimum, tmp_path / "int8", "int8", Job(os.environ))
    assert not check_folder(tmp_path / "int8").shared
    assert size_of(tmp_path / "int8") < 170e6  # tied embeddings are stored once here too
    assert np.mean(np.array(likeliest(tmp_path / "int8")) == expected) >= 0.9


def test_a_kind_of_the_other_format_is_refused(smollm2_onnx: Path, smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int4, mixed, int8, int8-dynamic"):
        quantize(smollm2_onnx, tmp_path / "x", "q4_k_m", Job(os.environ))
    with pytest.raises(ConfigError, match="q4_k_m"):
        quantize(smollm2, tmp_path / "x", "int4", Job(os.environ))


def test_a_full_disk_is_noticed_before_anything_is_written(smollm2_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"GB.*are free"):
        quantize(smollm2_onnx, tmp_path / "x", "int4", Job(os.environ, free_space=lambda folder: 10**8))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_stays(smollm2_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        quantize(smollm2_onnx, tmp_path / "mine", "int4", Job(os.environ))
    assert list((tmp_path / "mine").iterdir()) == []
