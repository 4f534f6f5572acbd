"""What a GGUF file says about itself, read without loading it.

A file may come from anywhere: nothing is believed before it is read, and what is read is bounded by the file's length.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from protocol.errors import BadModelFile

ALIGNMENT = 32  # bytes, of tensors that no `general.alignment` is given for
DAMAGED = (struct.error, KeyError, ValueError)
"""What the readers of this module raise where the bytes are no header."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 26  # bytes of one string or array of numbers; a damaged file may claim anything
_DIMENSIONS = 4
_LENGTH = struct.Struct("<Q")
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
            values = read_values(file)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    except DAMAGED:
        raise BadModelFile(f"{path}: not a GGUF file, or its header is damaged") from None
    architecture = str(values.get("general.architecture", "unknown"))
    return GgufHeader(
        architecture=architecture,
        quantisation=_FILE_TYPES.get(values.get("general.file_type", -1), "unknown"),
        licence=str(values.get("general.license", "unknown")),
        context=values.get(f"{architecture}.context_length"),
    )


def read_values(file: BinaryIO) -> dict[str, Any]:
    """Every metadata key of the header. Raises one of DAMAGED where it is none."""
    return _keys(file)[1]


def read_contents(file: BinaryIO) -> Contents:
    """Metadata and the tensors' entries. Raises one of DAMAGED where the bytes are no header."""
    count, values, kinds = _keys(file)
    tensors = [_tensor(file) for _ in range(count)]
    if len({tensor.name for tensor in tensors}) < count:
        raise ValueError("two tensors of one name")
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(alignment)
    return Contents(values, kinds, tensors, -(-file.tell() // alignment) * alignment)


def _keys(file: BinaryIO) -> tuple[int, dict[str, Any], dict[str, str]]:
    """How many tensors there are, each key's value and each key's type."""
    magic, version, tensors, count = _take(file, "4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(magic)
    values: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for _ in range(count):
        key = _string(file)
        if key in values:
            raise ValueError("two keys of one name")
        (kind,) = _take(file, "I")
        values[key], kinds[key] = _value(file, kind)
    return tensors, values, kinds


def _value(file: BinaryIO, kind: int) -> tuple[Any, str]:
    if kind == _STRING:
        return _string(file), "string"
    if kind != _ARRAY:
        return _take(file, _SCALARS[kind])[0], _SCALARS[kind]
    element, count = _take(file, "IQ")
    if element == _STRING:
        return [_string(file) for _ in range(count)], "array of string"
    letter = _SCALARS[element]  # an array of arrays is in no model: llama.cpp reads none
    if count * struct.calcsize(letter) > _LONGEST:
        raise ValueError(count)
    return list(_take(file, f"{count}{letter}")), f"array of {letter}"


def _tensor(file: BinaryIO) -> Tensor:
    name = _string(file)
    (dimensions,) = _take(file, "I")
    if not 1 <= dimensions <= _DIMENSIONS:
        raise ValueError(dimensions)
    shape = _take(file, f"{dimensions}Q")
    kind, offset = _take(file, "IQ")
    return Tensor(name, shape[::-1], kind, offset)


def _string(file: BinaryIO) -> str:
    (length,) = _LENGTH.unpack(file.read(8))
    if length > _LONGEST:
        raise ValueError(length)
    raw = file.read(length)
    if len(raw) < length:
        raise ValueError("truncated")
    return raw.decode("utf-8", "replace")


def _take(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
