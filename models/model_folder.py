"""Whether a folder holds an ONNX decoder that Skerry can run, found out before onnxruntime gets any of it.

A folder may come from anywhere. What onnxruntime would read must lie inside the folder and be as long as the tensors
say; no code of a model's own is loaded; and inputs and outputs must be those that the engine binds memory to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from models.catalog import MODEL
from models.onnx_header import RAW, OnnxGraph, OnnxTensor, ValueInfo, read_graph
from protocol.errors import BadModelFile, UnsafePath

TOKENIZER = "tokenizer.json"
FLOAT, INT64, FLOAT16 = 1, 7, 10  # ONNX' numbers of types

TYPES = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16), 6: ("int32", 32),
    7: ("int64", 64), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64), 12: ("uint32", 32), 13: ("uint64", 64),
    14: ("complex64", 64), 15: ("complex128", 128), 16: ("bfloat16", 16), 17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8), 19: ("float8e5m2", 8), 20: ("float8e5m2fnuz", 8), 21: ("uint4", 4), 22: ("int4", 4),
    23: ("float4e2m1", 4), 24: ("float8e8m0", 8), 25: ("uint2", 2), 26: ("int2", 2),
}  # fmt: skip
"""Name and bits of ONNX' types, by number."""

_DOMAINS = {"", "com.microsoft", "ai.onnx.ml"}
_RUN_MORE = {"com.microsoft:EPContext", "com.microsoft:PythonOp", "com.microsoft:TritonOp"}
_FIXED_SIZE = {4, RAW, 10}  # TensorProto's fields whose values have as many bytes as in memory: floats, raw, doubles
_PLAIN = re.compile(r"[^./\\\0*:][^/\\\0*:]*")  # a file beside the model that is not hidden
_LAYERS, _HEADS, _SIZE, _WIDTH, _VOCAB = 256, 128, 512, 1 << 16, 1 << 22  # most that any model has, and some
_TOKENIZER = 64 << 20  # bytes; that of the largest vocabularies has some 30 MB
_TOKENS = 1 << 21  # entries of one tokenizer
_EXPORT = "`skerry models export` makes a model that Skerry runs"

KvType: TypeAlias = Literal["float32", "float16"]


@dataclass(frozen=True, slots=True)
class Decoder:
    """`width` of the hidden state, None if the model gives none; `last_only`: logits for the last token alone;
    `shared`: new keys and values go where the past ones are (GroupQueryAttention), else past and new are joined."""

    graph: OnnxGraph
    layers: int
    kv_heads: int
    head_size: int
    vocab: int
    width: int | None
    kv_dtype: KvType
    position_ids: bool
    hidden: bool
    last_only: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What `tokenizer.json` says: the algorithm's name, how many ids there are, and the control tokens as written."""

    kind: str
    ids: int
    controls: tuple[str, ...]


def check_folder(path: Path) -> Decoder:
    """Raises BadModelFile, UnsafePath."""
    graph = read_graph(path / MODEL)
    check_data(path, graph)
    return decoder_of(path, graph)


def check_data(path: Path, graph: OnnxGraph) -> None:
    """Everything that onnxruntime would read is there, inside the folder, and of the length that the tensors have.

    Raises BadModelFile, UnsafePath.
    """
    sizes: dict[str, int] = {}
    for tensor in (*graph.initializers, *graph.constants):
        if tensor.location is None:
            if not _agrees_inside(tensor):
                raise BadModelFile(f"{path / MODEL}: damaged: {_named(tensor)} is not as long as its shape says")
            continue
        if tensor.location not in sizes:
            sizes[tensor.location] = _size_beside(path, tensor.location)
        _check_outside(path, tensor, sizes[tensor.location])


def decoder_of(path: Path, graph: OnnxGraph) -> Decoder:
    """Raises BadModelFile if it is no decoder with a cache, or needs code of its own."""
    try:
        _check_operators(graph)
        return _decoder(graph)
    except ValueError as error:
        raise BadModelFile(f"{path}: {error}; {_EXPORT}") from None


def check_tokenizer(folder: Path, vocab: int) -> None:
    """Raises BadModelFile unless `tokenizer.json` can be that of a model with logits for `vocab` tokens."""
    ids = read_vocabulary(folder).ids
    if not vocab / 2 <= ids <= vocab:  # vocabularies are filled up to a round number, never doubled
        raise BadModelFile(
            f"{folder / TOKENIZER}: has {ids:,} tokens and the model logits for {vocab:,}: it is another model's "
            "tokenizer; put the one there that the model was trained with"
        )


def read_vocabulary(folder: Path) -> Vocabulary:
    """Raises BadModelFile if `tokenizer.json` is missing, too large or not as tokenizers are written."""
    path = folder / TOKENIZER
    try:
        raw = path.read_bytes() if path.is_file() and path.stat().st_size <= _TOKENIZER else None
        if raw is None or raw.count(b":") > _TOKENS or raw.count(b"[") > _TOKENS:
            path.stat()  # it is missing: that is another problem
            raise BadModelFile(f"{path}: no file, or larger than a tokenizer can be")
        written = msgspec.json.decode(raw, type=_Tokenizer)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}; copy the tokenizer of the model there") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadModelFile(f"{path}: not as tokenizers are written: {error}") from None
    vocab = written.model.vocab
    numbers = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    ids = [*numbers, *(added.id for added in written.added_tokens)]
    if not ids or min(ids) < 0:
        raise BadModelFile(f"{path}: has no tokens, or one with a negative number")
    controls = tuple(added.content for added in written.added_tokens if added.special)
    return Vocabulary(written.model.type, max(ids) + 1, controls)


def bytes_of(dtype: int, shape: Iterable[int]) -> int | None:
    """In memory; None if the type's size is not known."""
    bits = TYPES.get(dtype, ("", 0))[1]
    return -(-math.prod(shape) * bits // 8) if bits else None


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    type: str = "unknown"


class _Tokenizer(msgspec.Struct):
    """All that is read of it: the rest is passed over without taking memory."""

    model: _Model
    added_tokens: list[_Added] = []


def _agrees_inside(tensor: OnnxTensor) -> bool:
    size = bytes_of(tensor.dtype, tensor.shape)
    if size is None:
        return True
    if tensor.form in _FIXED_SIZE or not size or not tensor.length:
        return tensor.length == size
    # A value takes one to ten bytes, and up to four of few bits share one.
    values = math.prod(tensor.shape)
    return -(-values // 4) <= tensor.length <= 10 * values


def _size_beside(path: Path, location: str) -> int:
    """Of a file that the model names. What a model's fingerprint does not cover may not be named either."""
    if not _PLAIN.fullmatch(location) or not location.isprintable() or location.endswith(".json"):
        raise UnsafePath(
            f"{path / MODEL}: keeps weights in {location[:200]!r}, which is not a plain file beside it; {_EXPORT}"
        )
    try:
        target = (path / location).resolve(strict=True)
        inside = target.is_relative_to(path.resolve())
        if inside and not target.is_file():
            raise BadModelFile(f"{path / location}: not a file; copy the whole folder again")
        size = target.stat().st_size
    except (OSError, RuntimeError, ValueError):  # missing, links in a circle, no name for a file
        raise BadModelFile(f"{path / location[:200]}: missing, though {MODEL} keeps weights there") from None
    if not inside:
        raise UnsafePath(f"{path / location}: a link to outside of the folder; copy the file itself there")
    return size


def _check_outside(path: Path, tensor: OnnxTensor, size: int) -> None:
    known = bytes_of(tensor.dtype, tensor.shape)
    length = tensor.length or known or 0
    if known not in (None, length):
        raise BadModelFile(f"{path / MODEL}: damaged: {_named(tensor)} is not as long as its shape says")
    if tensor.offset + length > size:
        raise BadModelFile(f"{path / str(tensor.location)}: truncated: {_named(tensor)} is not all there")


def _named(tensor: OnnxTensor) -> str:
    return ascii(tensor.name[:80]) if tensor.name else "a tensor without a name"


def _check_operators(graph: OnnxGraph) -> None:
    """Raises ValueError."""
    foreign = sorted(ascii(op[:80]) for op in graph.ops if op.rpartition(":")[0] not in _DOMAINS or op in _RUN_MORE)
    if foreign:
        raise ValueError(f"it needs operators that Skerry loads no library for: {', '.join(foreign[:5])}")
    if graph.sparse or graph.functions:
        raise ValueError("it has sparse tensors or functions of its own, which are not run")


def _decoder(graph: OnnxGraph) -> Decoder:
    """Raises ValueError."""
    weights = {tensor.name for tensor in graph.initializers}  # inputs too in files of the first versions
    inputs = {value.name: value for value in graph.inputs if value.name not in weights}
    outputs = {value.name: value for value in graph.outputs}
    layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in inputs)
    if not 1 <= layers <= _LAYERS:
        raise ValueError("it has no inputs past_key_values.0.key and so on, so it is no decoder with a cache")
    pasts = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    presents = [f"present.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    _must_have("input", inputs, ["input_ids", "attention_mask", *pasts])
    _must_have("output", outputs, ["logits", *presents])
    if unknown := sorted(inputs.keys() - {"input_ids", "attention_mask", "position_ids", *pasts}):
        raise ValueError(
            f"it wants inputs that Skerry does not have: {', '.join(ascii(name[:80]) for name in unknown[:5])}"
        )
    for name in ("input_ids", "attention_mask", "position_ids"):
        if name in inputs:
            _check_ids(inputs[name])
    heads, size, kv_dtype = _cells([inputs[name] for name in pasts], [outputs[name] for name in presents])
    vocab = _last(outputs["logits"], _VOCAB)
    hidden = outputs.get("hidden_states")
    width = None if hidden is None else _last(hidden, _WIDTH)
    tokens = outputs["logits"].shape[1]
    if isinstance(tokens, int) and tokens != 1:
        raise ValueError(f"it gives logits for {tokens} tokens at a time, not for the last one or all")
    if hidden is not None and isinstance(hidden.shape[1], int):
        raise ValueError("its output hidden_states is not for all tokens")
    return Decoder(
        graph=graph,
        layers=layers,
        kv_heads=heads,
        head_size=size,
        vocab=vocab,
        width=width,
        kv_dtype=kv_dtype,
        position_ids="position_ids" in inputs,
        hidden=hidden is not None,
        last_only=tokens == 1,
        shared=graph.ops["com.microsoft:GroupQueryAttention"] > 0,
    )


def _must_have(what: str, there: Iterable[str], wanted: Iterable[str]) -> None:
    names = set(there)
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"it has no {what} {', '.join(missing[:5])}")


def _check_ids(value: ValueInfo) -> None:
    """(batch, tokens) whole numbers, of any length."""
    if value.dtype != INT64 or len(value.shape) != 2 or isinstance(value.shape[1], int):
        raise ValueError(f"its input {value.name} does not take any number of int64")


def _cells(pasts: list[ValueInfo], presents: list[ValueInfo]) -> tuple[int, int, KvType]:
    """Key-value heads, size of a head, and type: the same in all layers."""
    shape, dtype = pasts[0].shape, pasts[0].dtype
    if dtype not in (FLOAT, FLOAT16):
        raise ValueError(f"its cache is of {_type_name(dtype)}, not of float32 or float16")
    if len(shape) != 4 or isinstance(shape[2], int):
        raise ValueError("its past keys are not of shape (batch, heads, past tokens, size of a head)")
    heads, size = shape[1], shape[3]
    if not (isinstance(heads, int) and 1 <= heads <= _HEADS and isinstance(size, int) and 1 <= size <= _SIZE):
        raise ValueError(f"its past keys have {heads} heads of size {size}, which no model has")
    for value in pasts:
        if value.dtype != dtype or len(value.shape) != 4 or (value.shape[1], value.shape[3]) != (heads, size):
            raise ValueError(f"its input {value.name} is of another type or shape than {pasts[0].name}")
    for value in presents:  # where an exporter does not know a number, onnxruntime compares it during the pass
        known = [one for one in zip(value.shape[1::2], (heads, size), strict=False) if isinstance(one[0], int)]
        if value.dtype != dtype or len(value.shape) != 4 or any(found != wanted for found, wanted in known):
            raise ValueError(f"its output {value.name} is of another type or shape than {pasts[0].name}")
    return heads, size, "float32" if dtype == FLOAT else "float16"


def _last(value: ValueInfo, most: int) -> int:
    """The last dimension, of float32 (batch, tokens, size)."""
    if value.dtype != FLOAT:
        raise ValueError(f"its output {value.name} is of {_type_name(value.dtype)}, not of float32")
    size = value.shape[2] if len(value.shape) == 3 else 0
    if not isinstance(size, int) or not 1 <= size <= most:
        raise ValueError(f"its output {value.name} is not of shape (batch, tokens, size) with a size that models have")
    return size


def _type_name(dtype: int) -> str:
    return TYPES.get(dtype, ("an unknown type", 0))[0]
