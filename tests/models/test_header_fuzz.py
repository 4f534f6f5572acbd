"""Headers that are cut, flipped and spliced: a reader gives an answer or says what is wrong, in little memory."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.gguf_header import DAMAGED, check_tensors, read_contents, read_header
from models.model_folder import check_folder, check_tokenizer
from models.onnx_header import read_graph
from models.workshop.inspect import inspect
from protocol.errors import BadModelFile, UnsafePath
from tests.models.onnx_folders import write_folder
from tests.models.tiny import Tiny

_MEMORY = 8 << 20  # bytes; the files have some kilobytes
Reader = Callable[[Path], object]

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_gguf(path: Path) -> bytes:
    """A header with keys of all kinds, and tensors of two types."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_file_type(7)
    writer.add_token_list(["a", "b", "<|end|>"])
    writer.add_token_scores([0.5, 1.5, 2.5])
    writer.add_token_types([1, 1, 3])
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_bool("general.flag", True)
    tiny = Tiny("llama")
    writer.add_tensor("output.weight", tiny.weights["output"])
    packed = gguf.quants.quantize(tiny.weights["token_embd"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_gguf(tmp_path_factory.mktemp("good") / "x.gguf")


@pytest.fixture(scope="module")
def good_onnx(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (write_folder(tmp_path_factory.mktemp("good")) / "model.onnx").read_bytes()


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < _MEMORY
    finally:
        tracemalloc.stop()


def answers(read: Reader, path: Path) -> None:
    with little_memory(), contextlib.suppress(BadModelFile, UnsafePath):
        read(path)


def mutated(data: st.DataObject, good: bytes, upto: int) -> bytes:
    """Up to four changes within the first `upto` bytes."""
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(upto, len(raw)) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "put", "number", "splice"]))
        if kind == "flip":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 40))]
        elif kind == "put":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        elif kind == "number":  # the places where lengths and counts stand
            raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 1 << 20, 1 << 31, (1 << 63) - 1])))
        else:
            other = data.draw(st.integers(0, len(good) - 1))
            raw[at : at + 64] = good[other : other + data.draw(st.integers(1, 64))]
        if not raw:
            break
    return bytes(raw)


def test_the_files_that_are_changed_below_are_good(good_gguf: bytes, good_onnx: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(good_gguf)
    assert len(check_tensors(path).tensors) == 2
    assert inspect(path).runs
    assert inspect(write_folder(tmp_path / "m")).runs


@many
@given(data=st.data())
def test_changed_gguf(data: st.DataObject, good_gguf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(mutated(data, good_gguf, upto=900))
    for read in (read_header, check_tensors, inspect):
        answers(read, path)


@many
@given(data=st.data())
def test_changed_onnx(data: st.DataObject, good_onnx: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    path = write_folder(folder) / "model.onnx"
    path.write_bytes(mutated(data, good_onnx, upto=len(good_onnx)))
    answers(read_graph, path)
    answers(lambda _: check_folder(folder), path)
    answers(lambda _: inspect(folder), path)


@many
@given(data=st.data())
def test_changed_tokenizer(data: st.DataObject, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m") / "tokenizer.json"
    good = path.read_bytes()
    path.write_bytes(mutated(data, good, upto=len(good)))
    answers(lambda path: check_tokenizer(path.parent, 64), path)


@many
@given(raw=st.binary(max_size=400), magic=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"\x08\x0a\x42\x02\x10\x15\x3a"]))
def test_random_bytes(raw: bytes, magic: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(magic + raw)
    for read in (read_header, check_tensors, read_graph):
        answers(read, path)


def test_cut_at_every_byte_gguf(good_gguf: bytes, tmp_path: Path) -> None:
    """Every shorter file is refused: the last tensor is not all there."""
    whole = read_contents(io.BytesIO(good_gguf))
    path = tmp_path / "x.gguf"
    for end in [*range(whole.data + 64), len(good_gguf) - 33]:
        path.write_bytes(good_gguf[:end])
        with pytest.raises(BadModelFile):
            check_tensors(path)


def test_cut_at_every_byte_onnx(good_onnx: bytes, tmp_path: Path) -> None:
    """Every shorter file is refused, but for those that end between two fields of the model itself."""
    path = tmp_path / "model.onnx"
    accepted = []
    for end in range(len(good_onnx)):
        path.write_bytes(good_onnx[:end])
        with contextlib.suppress(BadModelFile):
            accepted.append(read_graph(path))
    assert len(accepted) == 2  # without the second opset, without the metadata


ABSURD = {
    "2^60 keys": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60),
    "2^60 tensors": struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0),
    "a string of 60 MB": struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 60 << 20),
    "60 million numbers": struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 0, 60 << 20),
    "2^40 empty strings": struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1 << 40) + bytes(80_000),
    "arrays in arrays": struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1) * 50,
}


@pytest.mark.parametrize("raw", ABSURD.values(), ids=ABSURD)
def test_no_memory_is_given_for_what_is_not_there(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with little_memory():
        for read in (read_header, check_tensors):
            with pytest.raises(BadModelFile, match="not a GGUF file, or its header is damaged"):
                read(path)
        with pytest.raises(DAMAGED):
            read_contents(io.BytesIO(raw))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def a_list() -> bytes:
    return struct.pack("<IIQ", 9, 8, 1) + text("llama")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", a_list()),
        ("general.file_type", a_list()),
        ("general.file_type", struct.pack("<If", 6, float("nan"))),
        ("general.license", a_list()),
        ("unknown.context_length", struct.pack("<I", 8) + text("many")),
        ("unknown.context_length", struct.pack("<If", 6, float("nan"))),
        ("unknown.context_length", struct.pack("<I?", 7, True)),
    ],
)
def test_values_of_a_wrong_type_are_refused(key: str, value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text(key) + value)
    with pytest.raises(BadModelFile, match="header is damaged"):
        read_header(path)


def with_tensors(*tensors: tuple[tuple[int, ...], int, int], data: int) -> bytes:
    """A file with tensors of these (shape, type, offset), and so many bytes of data."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0)
    for index, (shape, kind, offset) in enumerate(tensors):
        head += text(f"t{index}") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32 + data)


F32, Q8_0, NOBODY_KNOWS = 0, 8, 250


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (with_tensors(((8,), F32, 0), data=31), "'t0' is not all there"),
        (with_tensors(((32,), Q8_0, 32), data=64), "'t0' is not all there"),
        (with_tensors(((1 << 63, 1 << 63), F32, 0), data=64), "'t0' is not all there"),
        (with_tensors(((8,), F32, 1 << 63), data=64), "'t0' is not all there"),
        (with_tensors(((8,), NOBODY_KNOWS, 65), data=64), "'t0' is not all there"),
        (with_tensors(((8,), F32, 16), ((8,), F32, 0), data=64), "'t0' lies on 't1'"),
        (with_tensors(((33,), Q8_0, 0), data=640), "header is damaged"),
        (with_tensors(((8, 0), F32, 0), data=64), "header is damaged"),
    ],
)
def test_tensors_lie_inside_the_file_each_for_itself(raw: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(BadModelFile, match=problem):
        check_tensors(path)


def test_tensors_that_are_where_they_should_be(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(with_tensors(((64,), Q8_0, 0), ((8, 2), F32, 96), ((8,), NOBODY_KNOWS, 160), data=160))
    assert len(check_tensors(path).tensors) == 3
    assert len(check_tensors(smollm2).tensors) == 272
