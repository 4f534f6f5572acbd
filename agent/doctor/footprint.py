"""How much memory a model takes while it runs: its file, the cells of its context, and the process around it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from agent.config import Model
from models.catalog import Entry
from models.engine.base import WINDOW
from models.gguf_header import read_values
from protocol.errors import BadModelFile

_PROCESS = 150_000_000  # bytes beside the file and the context, which is what an agent keeps to
_ELEMENT = {"f16": 2.0, "q8_0": 34 / 32}  # bytes; q8_0 stores 32 values with one 16-bit scale
_USUAL_CELL = 16_384  # elements of a cell where the file is not here to tell: the largest of models up to 2B parameters


@dataclass(frozen=True, slots=True)
class Shape:
    """`file` in bytes, `context` in tokens (what the model was trained for), `cell`: key and value elements that one
    token takes in all layers."""

    file: int
    context: int
    cell: int


def footprint(shape: Shape, model: Model) -> int:
    """Bytes that the agent takes with this model under this configuration."""
    cells = (min(model.context, shape.context) + WINDOW) * shape.cell * _ELEMENT[model.kv]
    return int(shape.file * (2 if model.repack else 1) + cells + _PROCESS)


def largest_context(shape: Shape, model: Model, available: int) -> int:
    """Tokens of context that fit, in steps of 256; 0 if none do."""
    left = available - shape.file * (2 if model.repack else 1) - _PROCESS
    return max(0, min(shape.context, int(left / (shape.cell * _ELEMENT[model.kv])) - WINDOW)) // 256 * 256


def guessed_shape(entry: Entry) -> Shape:
    """Of a catalog entry, without its file."""
    return Shape(entry.size, entry.context, _USUAL_CELL)


def read_shape(path: Path) -> Shape:
    """From the file's header. Raises BadModelFile."""
    try:
        with path.open("rb") as file:
            values = read_values(file)
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
    except (OSError, struct.error, KeyError, ValueError):
        raise BadModelFile(f"{path}: its header cannot be read") from None
    key = values.get(f"{architecture}.attention.key_length") or width // heads
    value = values.get(f"{architecture}.attention.value_length") or width // heads
    in_all_layers = sum(kv_heads) if isinstance(kv_heads, list) else kv_heads * layers
    return Shape(path.stat().st_size, context, in_all_layers * (key + value))
