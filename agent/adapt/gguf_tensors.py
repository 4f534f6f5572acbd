"""The weights of a GGUF file, dequantised a block of rows at a time.

The `gguf` library's own reader makes arrays of every token of the vocabulary (6 s and 160 MB for SmolLM2, 17 s and
500 MB for Qwen2.5), so only its dequantisation is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray

from models.gguf_header import DAMAGED, Tensor, read_contents
from protocol.errors import BadModelFile

_BLOCK = 1 << 20  # values that are dequantised at once


class Weights:
    """`architecture`: general.architecture of the file."""

    def __init__(self, path: Path) -> None:
        """Raises BadModelFile."""
        self._path = path
        try:
            with path.open("rb") as file:
                contents = read_contents(file)
            self._size = path.stat().st_size
        except OSError as error:
            raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
        except DAMAGED:
            raise BadModelFile(f"{path}: not a GGUF file, or its header is damaged") from None
        self.architecture = str(contents.values.get("general.architecture"))
        self._values = {key: value for key, value in contents.values.items() if not key.startswith("tokenizer.")}
        self._tensors = {tensor.name: tensor for tensor in contents.tensors}
        self._data = contents.data

    def value(self, key: str, default: Any = None) -> Any:
        """The file's `<architecture>.<key>`. Raises BadModelFile if it has none and there is no default."""
        found = self._values.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise BadModelFile(f"{self._path}: the header does not say {self.architecture}.{key}")
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first. Raises BadModelFile if there is no such tensor."""
        return self._tensor(name).shape

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in order, each block with the index of its first. Raises BadModelFile."""
        tensor = self._tensor(name)
        try:
            kind = GGMLQuantizationType(tensor.kind)
            stored = quant_shape_to_byte_shape(tensor.shape, kind)
        except ValueError:
            raise BadModelFile(f"{self._path}: {name} is stored in a way that cannot be read") from None
        start, size = self._data + tensor.offset, math.prod(stored)
        if start + size > self._size:
            raise BadModelFile(f"{self._path}: truncated: {name} is not all there; pull the model again")
        rows, row = stored[0], size // stored[0]
        step = max(1, _BLOCK // math.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else rows
        for at in range(0, rows, step):
            raw = np.fromfile(self._path, np.uint8, min(step, rows - at) * row, offset=start + at * row)
            yield at, np.asarray(dequantize(raw.reshape(-1, *stored[1:]), kind), np.float32)

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise BadModelFile(f"{self._path}: the model has no tensor {name}") from None
