"""What a GGUF file says about itself, read without loading it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from protocol.errors import BadModelFile

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 26  # bytes of one string; a damaged file may claim anything
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


def read_header(path: Path) -> GgufHeader:
    """Raises BadModelFile."""
    try:
        with path.open("rb") as file:
            values = read_values(file)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    except (struct.error, KeyError, ValueError):
        raise BadModelFile(f"{path}: not a GGUF file, or its header is damaged") from None
    architecture = str(values.get("general.architecture", "unknown"))
    return GgufHeader(
        architecture=architecture,
        quantisation=_FILE_TYPES.get(values.get("general.file_type", -1), "unknown"),
        licence=str(values.get("general.license", "unknown")),
        context=values.get(f"{architecture}.context_length"),
    )


def read_values(file: BinaryIO) -> dict[str, Any]:
    """Every metadata key of the header. Raises ValueError or struct.error where it is none."""
    magic, version, _tensors, count = _take(file, "4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(magic)
    values: dict[str, Any] = {}
    for _ in range(count):
        key = _string(file)
        (kind,) = _take(file, "I")
        values[key] = _value(file, kind)
    return values


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        element, count = _take(file, "IQ")
        return [_value(file, element) for _ in range(count)]
    return _take(file, _SCALARS[kind])[0]


def _string(file: BinaryIO) -> str:
    (length,) = _take(file, "Q")
    if length > _LONGEST:
        raise ValueError(length)
    return file.read(length).decode("utf-8", "replace")


def _take(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
