"""The reader of ONNX files, against the onnx package and against files that lie."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from models.onnx_header import RAW, Blockwise, OnnxTensor, ValueInfo, read_graph
from protocol.errors import BadModelFile
from tests.models.onnx_folders import CELLS, external, inputs, model, outputs


def varint(value: int) -> bytes:
    raw = b""
    while value > 127:
        raw += bytes([value & 127 | 128])
        value >>= 7
    return raw + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value % (1 << 64))


def message(field: int, *content: bytes) -> bytes:
    joined = b"".join(content)
    return varint(field << 3 | 2) + varint(len(joined)) + joined


def of(graph: bytes) -> bytes:
    """A model with this graph."""
    return number(1, 10) + message(8, number(2, 21)) + message(7, graph)


def pair(field: int, key: str, value: str) -> bytes:
    return message(field, message(1, key.encode()), message(2, value.encode()))


def test_it_reads_what_the_onnx_package_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    outside = external("far", [5, 2], location="weights.data", offset=64, length=40)
    path.write_bytes(model(tensors=[outside]).SerializeToString())
    graph = read_graph(path)
    assert (graph.producer, graph.ir_version, graph.metadata) == ("by-hand", 10, {"origin": "test"})
    assert graph.opsets == {"": 21, "com.microsoft": 1}
    assert [one.name for one in graph.inputs] == list(inputs())
    assert [one.name for one in graph.outputs] == list(outputs())
    assert graph.inputs[2] == ValueInfo("past_key_values.0.key", 1, CELLS)
    *of_branches, far = graph.initializers
    assert far == OnnxTensor("far", 1, (5, 2), "weights.data", 64, 40)
    assert [(one.name, one.length, one.form) for one in of_branches] == [("scale", 8, RAW)] * 2
    assert [(one.shape, one.length) for one in graph.constants] == [((3,), 24)]
    assert graph.ops == {
        "com.microsoft:GroupQueryAttention": 1,
        "com.microsoft:MatMulNBits": 1,
        "If": 1,
        "Neg": 2,
        "Constant": 1,
    }
    assert graph.blockwise == [Blockwise("MatMulNBits", 4, 32, 64, ("w_Q4", "w_scales"))]


def test_data_is_jumped_over(tmp_path: Path) -> None:
    """A gigabyte of weights inside the file costs neither memory nor reading."""
    size = 1 << 30
    raw = varint(9 << 3 | 2) + varint(size)
    tensor = number(1, size // 4) + number(2, 1) + message(8, b"w")
    head = varint(5 << 3 | 2) + varint(len(tensor) + len(raw) + size) + tensor + raw
    before = number(1, 10) + message(8, number(2, 21)) + varint(7 << 3 | 2) + varint(len(head) + size) + head
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.write(before)
        file.truncate(len(before) + size)
        file.seek(0, 2)
        file.write(pair(14, "after", "all"))
    tracemalloc.start()
    try:
        graph = read_graph(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert graph.initializers == [OnnxTensor("w", 1, (size // 4,), None, 0, size, 9)]
    assert graph.metadata == {"after": "all"}
    assert peak < 1 << 20


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = message(1, message(4, b"If"), message(5, message(6, graph)))
    return graph


DAMAGED = {
    "nothing": b"",
    "another format": b"GGUF" + bytes(200),
    "no graph": number(1, 10) + message(8, number(2, 21)),
    "no opset": number(1, 10) + message(7),
    "two graphs": of(b"") + message(7),
    "a message beyond the file": of(b"") + varint(14 << 3 | 2) + varint(1 << 40),
    "a message beyond its parent": of(varint(1 << 3 | 2) + varint(9)) + bytes(64),
    "a number beyond its parent": of(varint(3 << 3) + b"\xff") + bytes(64),
    "a number without end": b"\x08" + b"\xff" * 20,
    "a group": of(b"\x0b\x0c"),
    "a field of number 0": of(b"\x02\x00"),
    "a graph that is a number": number(1, 10) + number(7, 3),
    "graphs in graphs": of(nested(40)),
    "a negative dimension": of(message(5, number(1, -4))),
    "too many dimensions": of(message(5, message(1, bytes(100)))),
    "data twice": of(message(5, message(9, bytes(4)), message(4, bytes(4)))),
    "data inside and outside": of(message(5, message(9, bytes(4)), pair(13, "location", "x"))),
    "no location": of(message(5, number(14, 1))),
    "two locations": of(message(5, pair(13, "location", "a"), pair(13, "location", "b"))),
    "an offset that is no number": of(message(5, pair(13, "location", "a"), pair(13, "offset", "-1"))),
    "prepacked weights": of(message(5, pair(13, "location", "a"), pair(13, "prepacked_0", "x|0|9|k"))),
    "a constant in two parts": of(message(1, message(5, message(5), message(5)))),
    "two types": of(message(11, message(2), message(2))),
    "a name of 5 kB": of(message(5, message(8, b"n" * 5000))),
    "a name that is no text": of(message(5, message(8, b"\xff\xfe"))),
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(raw)
    with pytest.raises(BadModelFile, match=r"model\.onnx: not an ONNX model, or its header is damaged"):
        read_graph(path)


def test_a_graph_of_few_bytes_is_read(tmp_path: Path) -> None:
    """So the files above are refused for what their names say."""
    path = tmp_path / "model.onnx"
    path.write_bytes(of(nested(3) + message(5, number(1, 4), pair(13, "location", "a"))))
    assert read_graph(path).ops["If"] == 3


def test_a_graph_without_end_is_refused(tmp_path: Path) -> None:
    """Two bytes a node: what is kept is bounded, not only by the file's length."""
    path = tmp_path / "model.onnx"
    path.write_bytes(of(message(5) * 70_000))
    with pytest.raises(BadModelFile, match="damaged"):
        read_graph(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "model.onnx", tmp_path):
        with pytest.raises(BadModelFile, match="cannot be read"):
            read_graph(path)
