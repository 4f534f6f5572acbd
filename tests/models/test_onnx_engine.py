"""What is particular to the engine for ONNX; what every engine does is in test_engine_contract.py."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.adapter import Adapter, Factors, write
from models.engine.onnx import OnnxEngine
from models.rss import rss
from protocol.errors import BadAdapter, BadModelFile, ConfigError

Changed = Callable[[Path, Callable[[onnx.GraphProto], None]], Path]

TEXT = "The harbour master writes down every boat that leaves before the tide turns. "


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Changed]:
    """Makes the same model with another graph over the same tensors, for as long as the test runs: it is large."""

    def make(model: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model, folder)
        graph = onnx.load(model / "model.onnx", load_external_data=False)
        change(graph.graph)
        onnx.save(graph, folder / "model.onnx")
        return folder

    yield make
    shutil.rmtree(tmp_path / "changed", ignore_errors=True)


def logits_for_all(graph: onnx.GraphProto) -> None:
    """As Optimum exports by itself."""
    (last,) = [node for node in graph.node if node.name == "skerry/last_token"]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == last.output[0]:
                node.input[index] = last.input[0]
    graph.node.remove(last)
    (logits,) = [value for value in graph.output if value.name == "logits"]
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"


def no_hidden(graph: onnx.GraphProto) -> None:
    graph.output.remove(next(value for value in graph.output if value.name == "hidden_states"))


def read(engine: OnnxEngine, tokens: Sequence[int], size: int) -> np.ndarray:
    """The logits after `tokens`, fed `size` at a time."""
    place = engine.open(tokens, 0)
    place.rewind(0)
    for at in range(0, len(tokens), size):
        (step,) = engine.forward([(place, tokens[at : at + size])])
    place.close()
    return step.logits.copy()


def test_a_graph_with_logits_for_every_token_gives_the_same(smollm2_optimum: Path, changed: Changed) -> None:
    path = changed(smollm2_optimum, logits_for_all)
    whole, usual = (OnnxEngine(model, context=512, sequences=1, threads=1) for model in (path, smollm2_optimum))
    tokens = usual.tokenizer.encode(TEXT * 30)[:400]
    assert len(tokens) == 400
    for size in (400, 1):
        some = tokens if size > 1 else tokens[:30]
        np.testing.assert_allclose(read(whole, some, size), read(usual, some, size), atol=1e-3)
    whole.close()
    usual.close()


def test_a_graph_without_hidden_states_serves_a_device_without_memory(smollm2_onnx: Path, changed: Changed) -> None:
    path = changed(smollm2_onnx, no_hidden)
    with pytest.raises(BadModelFile, match=r"hidden states.*skerry models export.*memory\.enabled"):
        OnnxEngine(path)
    engine, usual = (OnnxEngine(one, context=64, sequences=1, threads=1, hidden=False) for one in (path, smollm2_onnx))
    tokens = usual.tokenizer.encode(TEXT)
    np.testing.assert_allclose(read(engine, tokens, 64), read(usual, tokens, 64), atol=1e-3)
    engine.close()
    usual.close()


def test_the_memory_of_a_forgotten_request_goes_back_to_the_system(smollm2_onnx: Path) -> None:
    engine = OnnxEngine(smollm2_onnx, context=2048, sequences=1, threads=1)
    tokens = engine.tokenizer.encode(TEXT * 100)[:1200]
    place = engine.open(tokens, 0)
    engine.forward([(place, tokens)])
    full = rss(os.getpid())
    place.rewind(0)
    cells = len(tokens) * 30 * 2 * 3 * 64 * 4  # layers, keys and values, heads, their size, bytes
    assert rss(os.getpid()) < full - 0.9 * cells
    engine.close()


def test_a_provider_that_is_not_there_is_passed_over(smollm2_onnx: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = OnnxEngine(smollm2_onnx, context=64, sequences=1, threads=1, providers=("cuda",))
    assert engine.provider == "cpu"
    assert "has no cuda" in caplog.text
    engine.close()


def test_a_provider_that_nobody_knows_is_a_mistake(smollm2_onnx: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.providers.*gpu.*tensorrt, cuda, cpu"):
        OnnxEngine(smollm2_onnx, providers=("gpu",))


def test_a_graph_that_onnxruntime_refuses_is_a_bad_file(smollm2_onnx: Path, changed: Changed) -> None:
    def break_it(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.op_type == "MatMul").op_type = "NoSuchOperator"

    with pytest.raises(BadModelFile, match=r"onnxruntime cannot load it.*NoSuchOperator"):
        OnnxEngine(changed(smollm2_onnx, break_it))


def test_it_takes_no_adapters(smollm2_onnx: Path, tmp_path: Path) -> None:
    engine = OnnxEngine(smollm2_onnx, context=64, sequences=1, threads=1)
    factors = Factors(np.ones((2, 576), np.float32), np.ones((192, 2), np.float32))
    path = tmp_path / "adapter.gguf"
    write(Adapter(engine.info.fingerprint, "llama", 2.0, {"blk.0.attn_v": factors}), path)
    with pytest.raises(BadAdapter, match="the bare model only"):
        engine.attach(path)
    assert engine.attached == frozenset()
    engine.close()
