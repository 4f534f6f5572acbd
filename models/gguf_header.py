"""What a GGUF file says about itself, read without loading it.

A file may come from anywhere: nothing is believed before it is read, no memory is taken for bytes that are not there,
and what is read is bounded.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from protocol.errors import BadModelFile

ALIGNMENT = 32  # bytes, of tensors that no `general.alignment` is given for
DAMAGED = (struct.error, KeyError, ValueError)
"""What the readers of this module raise where the bytes are no header."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 26  # bytes of the whole header; that of a vocabulary of 262,144 tokens has 7 MB
_ELEMENTS = 1 << 22  # of all arrays together; that vocabulary has 0.8 million
_ENTRIES = 1 << 16  # keys, and tensors
_DIMENSIONS = 4
_LENGTH = struct.Struct("<Q")
Value = TypeVar("Value", str, int)
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M",
    18: "Q6_K", 32: "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`context` in tokens; "unknown" and None where the file doesn't say."""

    architecture: str
    quantisation: str
    licence: str
    context: int | None


class Tensor(NamedTuple):
    """One tensor's entry. `shape` as numpy has it, rows first; `kind` is ggml's number of its type."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from where the data begins


@dataclass(frozen=True, slots=True)
class Contents:
    """All that stands before the data. `kinds`: each key's type: "string", the letter that `struct` has for a number,
    or "array of" one of these; `data`: where the tensors' bytes begin, counted from the file's beginning."""

    values: dict[str, Any]
    kinds: dict[str, str]
    tensors: list[Tensor]
    data: int


def read_header(path: Path) -> GgufHeader:
    """Raises BadModelFile."""
    try:
        with path.open("rb") as file:
            return header_of(read_values(file))
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    except DAMAGED:
        raise BadModelFile(f"{path}: not a GGUF file, or its header is damaged") from None


def header_of(values: dict[str, Any]) -> GgufHeader:
    """Raises ValueError where a value is of a type that it cannot be."""
    architecture = _typed(values, "general.architecture", str, "unknown")
    return GgufHeader(
        architecture=architecture,
        quantisation=_FILE_TYPES.get(_typed(values, "general.file_type", int, -1), "unknown"),
        licence=_typed(values, "general.license", str, "unknown"),
        context=_typed(values, f"{architecture}.context_length", int, 0) or None,
    )


def check_tensors(path: Path) -> Contents:
    """Every tensor lies inside the file and on bytes of its own; of a type that nobody knows here, it begins inside.

    Raises BadModelFile. No weight is read, so that it costs next to nothing before a file is loaded.
    """
    try:
        with path.open("rb") as file:
            contents = read_contents(file)
            size = file.seek(0, os.SEEK_END)
        at, before = contents.data, "its header"
        for tensor in sorted(contents.tensors, key=lambda tensor: tensor.offset):
            begin = contents.data + tensor.offset
            if begin < at:
                raise BadModelFile(f"{path}: damaged: {tensor.name[:80]!a} lies on {before}; pull the model again")
            at, before = begin + stored_bytes(tensor), ascii(tensor.name[:80])
            if at > size:
                raise BadModelFile(f"{path}: truncated: {before} is not all there; pull the model again")
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    except DAMAGED:
        raise BadModelFile(f"{path}: not a GGUF file, or its header is damaged") from None
    return contents


def stored_bytes(tensor: Tensor) -> int:
    """0 if its type is unknown. Raises ValueError if its rows are no whole number of blocks."""
    from gguf import GGML_QUANT_SIZES  # slow to import, and few ask

    block, size = next((sizes for kind, sizes in GGML_QUANT_SIZES.items() if kind == tensor.kind), (1, 0))
    if tensor.shape[-1] % block:
        raise ValueError(tensor.shape)
    return math.prod(tensor.shape) // block * size


def read_values(file: BinaryIO) -> dict[str, Any]:
    """Every metadata key of the header. Raises one of DAMAGED where it is none."""
    return _keys(_Source(file))[1]


def read_contents(file: BinaryIO) -> Contents:
    """Metadata and the tensors' entries. Raises one of DAMAGED where the bytes are no header."""
    source = _Source(file)
    count, values, kinds = _keys(source)
    tensors = [_tensor(source) for _ in range(count)]
    if len({tensor.name for tensor in tensors}) < count:
        raise ValueError("two tensors of one name")
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(alignment)
    return Contents(values, kinds, tensors, -(-file.tell() // alignment) * alignment)


class _Source:
    """The header's bytes, as far as there are any."""

    def __init__(self, file: BinaryIO) -> None:
        begin = file.tell()
        self._left = min(file.seek(0, os.SEEK_END) - begin, _LONGEST)
        self._elements = _ELEMENTS
        self._file = file
        file.seek(begin)

    def take(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        size = struct.calcsize(layout)
        self._left -= size
        if self._left < 0:
            raise ValueError("truncated")
        return struct.unpack(layout, self._file.read(size))

    def strings(self, count: int) -> list[str]:
        read, left = self._file.read, self._left
        found = []
        for _ in range(count):  # hundreds of thousands, so nothing is called that need not be
            (length,) = _LENGTH.unpack(read(8))
            left -= 8 + length
            if left < 0:
                raise ValueError("truncated")
            found.append(read(length).decode("utf-8", "replace"))
        self._left = left
        return found

    def reserve(self, elements: int) -> None:
        """Raises ValueError if an array claims more than all arrays may have."""
        self._elements -= elements
        if self._elements < 0:
            raise ValueError(elements)


def _keys(source: _Source) -> tuple[int, dict[str, Any], dict[str, str]]:
    """How many tensors there are, each key's value and each key's type."""
    magic, version, tensors, count = source.take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3) or max(tensors, count) > _ENTRIES:
        raise ValueError(magic)
    values: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for _ in range(count):
        (key,) = source.strings(1)
        if key in values:
            raise ValueError("two keys of one name")
        (kind,) = source.take("I")
        values[key], kinds[key] = _value(source, kind)
    return tensors, values, kinds


def _value(source: _Source, kind: int) -> tuple[Any, str]:
    if kind == _STRING:
        return source.strings(1)[0], "string"
    if kind != _ARRAY:
        return source.take(_SCALARS[kind])[0], _SCALARS[kind]
    element, count = source.take("IQ")
    source.reserve(count)
    if element == _STRING:
        return source.strings(count), "array of string"
    letter = _SCALARS[element]  # an array of arrays is in no model: llama.cpp reads none
    return list(source.take(f"{count}{letter}")), f"array of {letter}"


def _tensor(source: _Source) -> Tensor:
    (name,) = source.strings(1)
    (dimensions,) = source.take("I")
    if not 1 <= dimensions <= _DIMENSIONS:
        raise ValueError(dimensions)
    shape = source.take(f"{dimensions}Q")
    if not all(shape):
        raise ValueError(shape)
    kind, offset = source.take("IQ")
    return Tensor(name, shape[::-1], kind, offset)


def _typed(values: dict[str, Any], key: str, type_: type[Value], missing: Value) -> Value:
    value = values.get(key, missing)
    if type(value) is not type_:
        raise ValueError(key)
    return value
