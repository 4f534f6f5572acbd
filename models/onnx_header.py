"""What an ONNX file says about itself, read without the onnx package and without loading it.

The file is one protobuf message, the weights stand inside it or in files beside it. It may come from anywhere: nothing
is believed before it is read, every length must end inside the message that it stands in, the tensors' data is jumped
over, and what is walked and kept is bounded.
Formats: https://protobuf.dev/programming-guides/encoding/ and https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias, TypeVar

from protocol.errors import BadModelFile

UNKNOWN = "?"  # a dimension that has neither a number nor a name
RAW = 9
"""TensorProto's field with the values as they lie in memory; its other fields hold them in protobuf's own way."""

_LARGEST = 1 << 31  # bytes of a protobuf message
_FIELDS = 4_000_000  # walked in one file; a model of 100 layers has some 400,000
_KEPT = 32 << 20  # bytes of text read in one file
_NAME, _TEXT = 1 << 12, 1 << 20  # bytes of one name, of one value of the metadata
_ENTRIES = 1 << 16  # of one list
_DIMENSIONS = 16
_DEPTH = 8  # of graphs inside graphs
_WINDOW = 4096  # bytes read at once
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VALUES = {4, 5, 6, 7, RAW, 10, 11}  # TensorProto's fields that hold data
_BLOCKWISE = {"MatMulNBits", "GatherBlockQuantized"}
_OFFSET = re.compile(r"[0-9]{1,18}")

Span: TypeAlias = tuple[int, int]
"""Where a message begins and ends in the file."""
Held = TypeVar("Held", bound=Sized)


class ValueInfo(NamedTuple):
    """An input or output. `dtype`: ONNX' number of the type, 0 if it is no tensor; a dimension that varies is its
    name."""

    name: str
    dtype: int
    shape: tuple[int | str, ...]


class OnnxTensor(NamedTuple):
    """`location` names the file beside the model, None: the data is inside. `length` in bytes, 0 where nothing says so;
    `form`: the field that holds data inside, 0 if there is none."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    location: str | None
    offset: int
    length: int
    form: int = 0


class Blockwise(NamedTuple):
    """A node whose weights are integers of few bits, a scale for each block. `inputs`: names of the weights, scales and
    zero points; `values`: how many weights they stand for, 0 if the node doesn't say."""

    op: str
    bits: int
    block: int
    values: int
    inputs: tuple[str, ...]


@dataclass(slots=True)
class OnnxGraph:
    """`initializers` and `constants` (tensors of nodes' attributes) are those of the bodies of loops and branches too;
    `ops` counts nodes by "domain:type", or "type" alone in ONNX' own domain; `sparse` and `functions` count what is
    not read further."""

    producer: str = ""
    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    inputs: list[ValueInfo] = field(default_factory=list)
    outputs: list[ValueInfo] = field(default_factory=list)
    initializers: list[OnnxTensor] = field(default_factory=list)
    constants: list[OnnxTensor] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)
    blockwise: list[Blockwise] = field(default_factory=list)
    sparse: int = 0
    functions: int = 0


def read_graph(path: Path) -> OnnxGraph:
    """Raises BadModelFile."""
    try:
        with path.open("rb") as file:
            return _Reader(_Wire(file)).model()
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise BadModelFile(
            f"{path}: not an ONNX model, or its header is damaged; fetch it again, or make it with `skerry models "
            "export`"
        ) from None


class _Field(NamedTuple):
    """`value`: the number of a varint; else the content lies from `start` to `end`."""

    number: int
    wire: int
    start: int
    end: int
    value: int

    @property
    def span(self) -> Span:
        self._must_be(_BYTES)
        return self.start, self.end

    @property
    def natural(self) -> int:
        self._must_be(_VARINT)
        return _natural(self.value)

    def _must_be(self, wire: int) -> None:
        if self.wire != wire:
            raise ValueError(f"field {self.number} is written as {self.wire}")


class _Wire:
    """Protobuf's encoding, read through a small window."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.whole = (0, file.seek(0, os.SEEK_END))
        if self.whole[1] > _LARGEST:
            raise ValueError("larger than a message can be")
        self._window, self._start = b"", 0
        self._fields, self._kept = _FIELDS, _KEPT

    def fields(self, span: Span) -> Iterator[_Field]:
        at, end = span
        while at < end:
            self._fields -= 1
            tag, start = self._varint(at, end)
            number, wire, value = tag >> 3, tag & 7, 0
            if wire == _VARINT:
                value, at = self._varint(start, end)
            elif wire == _BYTES:
                length, start = self._varint(start, end)
                at = start + length
            elif wire in (_FIXED32, _FIXED64):
                at = start + (4 if wire == _FIXED32 else 8)
            else:  # groups, which ONNX has never had
                raise ValueError(wire)
            if at > end or not number or not self._fields:
                raise ValueError("a field leaves its message, or there is no end of them")
            yield _Field(number, wire, start, at, value)

    def varints(self, span: Span) -> Iterator[int]:
        at, end = span
        while at < end:
            value, at = self._varint(at, end)
            yield value

    def text(self, span: Span, limit: int = _NAME) -> str:
        start, end = span
        self._kept -= end - start
        if end - start > limit or self._kept < 0:
            raise ValueError("a text without end")
        offset = self._reach(start, end - start)
        return self._window[offset : offset + end - start].decode()

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number, and where the next byte is."""
        value = 0
        offset = self._reach(at, min(10, end - at))
        for length, byte in enumerate(self._window[offset : offset + min(10, end - at)]):
            value |= (byte & 127) << 7 * length
            if byte < 128:
                return value & (1 << 64) - 1, at + length + 1
        raise ValueError("a number without end")

    def _reach(self, at: int, length: int) -> int:
        """Where `at` is in the window, which then holds `length` bytes from there on."""
        offset = at - self._start
        if offset < 0 or offset + length > len(self._window):
            self._file.seek(at)
            self._window, self._start, offset = self._file.read(max(_WINDOW, length)), at, 0
            if len(self._window) < length:
                raise ValueError("truncated")
        return offset


class _Reader:
    """ONNX' messages. Of a field that may stand once, the last counts, as for whoever loads the file; messages that
    protobuf would merge are refused."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self._read = OnnxGraph()

    def model(self) -> OnnxGraph:
        read, graph = self._read, None
        for part in self._wire.fields(self._wire.whole):
            if part.number == 1:
                read.ir_version = part.natural
            elif part.number == 2:
                read.producer = self._wire.text(part.span)
            elif part.number == 7:
                graph = _only(graph, part)
            elif part.number == 8:
                self._opset(part.span)
            elif part.number == 14:
                key, value = self._pair(part.span)
                _bounded(read.metadata)[key] = value
            elif part.number == 25:
                read.functions += 1
        if graph is None or not read.ir_version or not read.opsets:
            raise ValueError("not a model")
        self._graph(graph, depth=0)
        return read

    def _opset(self, span: Span) -> None:
        domain, version = "", 0
        for part in self._wire.fields(span):
            if part.number == 1:
                domain = self._wire.text(part.span)
            elif part.number == 2:
                version = part.natural
        _bounded(self._read.opsets)[domain] = version

    def _pair(self, span: Span) -> tuple[str, str]:
        key = value = ""
        for part in self._wire.fields(span):
            if part.number == 1:
                key = self._wire.text(part.span)
            elif part.number == 2:
                value = self._wire.text(part.span, _TEXT)
        return key, value

    def _graph(self, span: Span, depth: int) -> None:
        if depth > _DEPTH:
            raise ValueError("graphs without end")
        read = self._read
        for part in self._wire.fields(span):
            if part.number == 1:
                self._node(part.span, depth)
            elif part.number == 5:
                _bounded(read.initializers).append(self._tensor(part.span))
            elif part.number == 15:
                read.sparse += 1
            elif part.number in (11, 12) and depth == 0:
                values = read.inputs if part.number == 11 else read.outputs
                _bounded(values).append(self._value_info(part.span))

    def _node(self, span: Span, depth: int) -> None:
        op = domain = ""
        inputs: list[_Field] = []
        numbers: dict[str, int] = {}
        for part in self._wire.fields(span):
            if part.number == 1 and len(inputs) < 4:
                inputs.append(part)
            elif part.number == 4:
                op = self._wire.text(part.span)
            elif part.number == 5:
                self._attribute(part.span, depth, numbers)
            elif part.number == 7:
                domain = self._wire.text(part.span)
        name = op if domain in ("", "ai.onnx") else f"{domain}:{op}"
        _bounded(self._read.ops)[name] += 1
        if domain == "com.microsoft" and op in _BLOCKWISE:
            values = numbers.get("K", 0) * numbers.get("N", 0)
            names = tuple(self._wire.text(one.span) for one in inputs)
            weights = names[1:] if op == "MatMulNBits" else names[:1] + names[2:]  # the other one is what it works on
            bits, block = numbers.get("bits", 4), numbers.get("block_size", 0)
            _bounded(self._read.blockwise).append(Blockwise(op, bits, block, values, weights))

    def _attribute(self, span: Span, depth: int, numbers: dict[str, int]) -> None:
        """Walks what is in it; a number that describes blocks goes to `numbers`."""
        name, value, tensor = (0, 0), None, None
        for part in self._wire.fields(span):
            if part.number == 1:
                name = part.span
            elif part.number == 3 and part.wire == _VARINT:
                value = part.value
            elif part.number in (5, 10):
                tensor = _only(tensor, part) if part.number == 5 else tensor
                _bounded(self._read.constants).append(self._tensor(part.span))
            elif part.number in (6, 11):
                self._graph(part.span, depth + 1)
            elif part.number in (22, 23):
                self._read.sparse += 1
        if value is not None and name[1] - name[0] <= len("block_size"):
            key = self._wire.text(name)
            if key in ("bits", "block_size", "K", "N"):
                numbers[key] = _natural(value)

    def _tensor(self, span: Span) -> OnnxTensor:
        name, dtype, length, form, outside = "", 0, 0, 0, False
        shape: list[int] = []
        external: dict[str, str] = {}
        for part in self._wire.fields(span):
            if part.number == 1:
                self._dimensions(part, shape)
            elif part.number == 2:
                dtype = part.natural
            elif part.number in _VALUES:
                if form not in (0, part.number):
                    raise ValueError("a tensor with two kinds of data")
                form, length = part.number, length + part.end - part.start
            elif part.number == 8:
                name = self._wire.text(part.span)
            elif part.number == 13:
                key, value = self._pair(part.span)
                if key in external:
                    raise ValueError("two places for one tensor")
                external[key] = value
            elif part.number == 14:
                outside = part.natural == 1
        if not outside and not external:
            return OnnxTensor(name, dtype, tuple(shape), None, 0, length, form)
        if form:
            raise ValueError("a tensor both inside and outside")
        return OnnxTensor(name, dtype, tuple(shape), *_place(external))

    def _dimensions(self, part: _Field, shape: list[int]) -> None:
        """One dimension, or several in one field."""
        found = [part.value] if part.wire == _VARINT else self._wire.varints(part.span)
        for value in found:
            shape.append(_natural(value))
            if len(shape) > _DIMENSIONS:
                raise ValueError("dimensions without end")

    def _value_info(self, span: Span) -> ValueInfo:
        name, kind, tensor, extent = "", None, None, None
        for part in self._wire.fields(span):
            if part.number == 1:
                name = self._wire.text(part.span)
            elif part.number == 2:
                kind = _only(kind, part)
        for part in self._wire.fields(kind or (0, 0)):
            if part.number == 1:
                tensor = _only(tensor, part)
        dtype, shape = 0, list[int | str]()
        for part in self._wire.fields(tensor or (0, 0)):
            if part.number == 1:
                dtype = part.natural
            elif part.number == 2:
                extent = _only(extent, part)
        for part in self._wire.fields(extent or (0, 0)):
            if part.number == 1 and len(shape) < _DIMENSIONS:
                shape.append(self._dimension(part.span))
        return ValueInfo(name, dtype, tuple(shape))

    def _dimension(self, span: Span) -> int | str:
        found: int | str = UNKNOWN
        for part in self._wire.fields(span):
            if part.number == 1:
                found = part.natural
            elif part.number == 2:
                found = self._wire.text(part.span) or UNKNOWN
        return found


def _only(before: Span | None, part: _Field) -> Span:
    if before is not None:
        raise ValueError("two messages where one may stand")
    return part.span


def _natural(value: int) -> int:
    if value >= 1 << 63:
        raise ValueError("a negative number")
    return value


def _place(external: dict[str, str]) -> tuple[str, int, int]:
    """Location, offset and length. What else may stand there (prepacked weights) is nothing that Skerry reads."""
    if external.keys() - {"location", "offset", "length", "checksum"} or not external.get("location"):
        raise ValueError("a place that says too little or too much")
    numbers = external.get("offset", "0"), external.get("length", "0")
    if not all(map(_OFFSET.fullmatch, numbers)):
        raise ValueError(numbers)
    return external["location"], int(numbers[0]), int(numbers[1])


def _bounded(entries: Held) -> Held:
    if len(entries) >= _ENTRIES:
        raise ValueError("a list without end")
    return entries
