"""How much memory a model takes while it runs: its file, the cells of its context, and the process around it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from models import parameters
from models.catalog import Entry
from models.engine.base import WINDOW
from models.engine.open import kind_of
from models.fingerprint import size_of
from models.gguf_header import DAMAGED, read_contents
from models.hf_config import read_config
from models.model_folder import check_folder
from protocol.errors import BadModelFile

_PROCESS = 150_000_000  # bytes beside the file and the context, which is what an agent keeps to
_ELEMENT = {"f16": 2.0, "q8_0": 34 / 32}  # bytes; q8_0 stores 32 values with one 16-bit scale
_FLOAT32 = 4.0
# onnxruntime arranges weights for the processor, and the tokenizers library keeps its merges: measured of SmolLM2 (105
# to 542 MB, 49k tokens: 140 to 310 MB beside file and process) and Gemma 3 270M (369 MB, 262k tokens: 420 MB).
_ARRANGED = 1.25
_TOKEN = 1200  # bytes
_USUAL_CELL = 16_384  # elements of a cell where the file is not here to tell: the largest of models up to 2B parameters
_USUAL_CONTEXT = 4096  # tokens, of an ONNX folder that does not say for how many it was trained
_USUAL_BITS = 5  # of a weight with its share of a scale, where a name does not tell how many there are
_NAMED = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?) ?([MB])(?![A-Za-z])")  # 135M, 0.5B


class Settings(Protocol):
    """What of a configuration decides (agent.config.Model, models.engine.open.EngineOptions)."""

    @property
    def context(self) -> int: ...

    @property
    def kv(self) -> str: ...

    @property
    def repack(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """`file` in bytes, `context` in tokens (what the model was trained for), `cell`: key and value elements that one
    token takes in all layers, `weights`: how many there are. `element`: bytes of a cell's element where the file
    settles it (ONNX), else None; `vocab`: tokens of a tokenizer that is not the engine's own (ONNX), else 0."""

    file: int
    context: int
    cell: int
    weights: int
    element: float | None = None
    vocab: int = 0


def footprint(shape: Shape, model: Settings) -> int:
    """Bytes that the agent takes with this model under this configuration."""
    cells = min(model.context, shape.context) + WINDOW
    return int(_loaded(shape, model) + cells * cell_bytes(shape, model) + _PROCESS)


def largest_context(shape: Shape, model: Settings, available: int) -> int:
    """Tokens of context that fit, in steps of 256; 0 if none do."""
    left = available - _loaded(shape, model) - _PROCESS
    return max(0, min(shape.context, int(left / cell_bytes(shape, model)) - WINDOW)) // 256 * 256


def cell_bytes(shape: Shape, model: Settings) -> float:
    """Of one token's keys and values."""
    return shape.cell * (shape.element or _ELEMENT[model.kv])


def guessed_shape(entry: Entry) -> Shape:
    """Of a catalog entry, without its file."""
    element = _FLOAT32 if entry.files else None
    named = _NAMED.search(entry.name) or _NAMED.search(entry.id.upper())
    weights = float(named[1]) * {"M": 1e6, "B": 1e9}[named[2]] if named else entry.size * 8 / _USUAL_BITS
    return Shape(entry.size, entry.context, _USUAL_CELL, int(weights), element)


def read_shape(path: Path) -> Shape:
    """From the header of a GGUF file, or of the graph in an ONNX folder. Raises BadModelFile, UnsafePath."""
    return _gguf_shape(path) if kind_of(path) == "gguf" else _onnx_shape(path)


def _gguf_shape(path: Path) -> Shape:
    try:
        with path.open("rb") as file:
            contents = read_contents(file)
        values = contents.values
        architecture = values["general.architecture"]
        layers, width, heads, kv_heads, context = (
            values[f"{architecture}.{key}"]
            for key in (
                "block_count",
                "embedding_length",
                "attention.head_count",
                "attention.head_count_kv",
                "context_length",
            )
        )
        key = values.get(f"{architecture}.attention.key_length") or width // heads
        value = values.get(f"{architecture}.attention.value_length") or width // heads
        cell = (sum(kv_heads) if isinstance(kv_heads, list) else kv_heads * layers) * (key + value)
        if not all(isinstance(number, int) and number > 0 for number in (cell, context)):
            raise ValueError(cell, context)
    except (OSError, TypeError, ZeroDivisionError, *DAMAGED):
        raise BadModelFile(f"{path}: its header cannot be read") from None
    return Shape(path.stat().st_size, context, cell, parameters.of_gguf(contents.tensors))


def _onnx_shape(path: Path) -> Shape:
    decoder = check_folder(path)
    cell = 2 * decoder.layers * decoder.kv_heads * decoder.head_size
    # A graph that grows its cache reads one block of memory and writes another.
    element = np.dtype(decoder.kv_dtype).itemsize * (1 if decoder.shared else 2)
    weights = parameters.of_onnx(decoder.graph, decoder.vocab)
    try:
        size = size_of(path)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    return Shape(size, read_config(path).context or _USUAL_CONTEXT, cell, weights, float(element), decoder.vocab)


def _loaded(shape: Shape, model: Settings) -> int:
    """Bytes of the weights in memory, and of the tokenizer where it is not llama.cpp's."""
    if shape.element is not None:
        return int(shape.file * _ARRANGED) + shape.vocab * _TOKEN
    return shape.file * (2 if model.repack else 1)
