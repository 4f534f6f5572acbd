"""A LoRA adapter and its file: what a device has learned, as small changes of the model's matrices.

Hu et al., LoRA (2021), eq. 3: W' = W + (alpha / r) B A. The file is llama.cpp's own (GGUF, `<matrix>.weight.lora_a` and
`.lora_b` in float16), so llama.cpp attaches it as it is; what else belongs to the adapter stands beside it under
`skerry.adapter.*`. So the SHA-256 of the file covers all of it and is the adapter's id.

Files come from other devices: `parse` believes nothing, and what it lets through llama.cpp can read.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.gguf_header import ALIGNMENT, DAMAGED, Contents, Tensor, read_contents
from models.partial import fsync_folder
from protocol.errors import BadAdapter, BadModelFile, StoreError

Floats = NDArray[np.float32]

MOST_BYTES = 1 << 28
"""The largest file that is read; an upload may end there."""
MOST_RANK = 256

_HEADER = 1 << 20  # bytes; a thousand matrices take a tenth of it
_FLOAT16 = 1  # ggml's number of the type
_ALPHA, _MODEL, _CENTROID = "adapter.lora.alpha", "skerry.adapter.model", "skerry.adapter.centroid"
_KINDS = {  # llama.cpp ends the process where a key that it asks for has another type
    "general.type": "string",
    "general.architecture": "string",
    "adapter.type": "string",
    _ALPHA: "f",
    _MODEL: "string",
    _CENTROID: "array of f",
}
_OURS = "skerry."  # keys of a later version may be there; nobody else reads them
_MATRIX = re.compile(r"blk\.\d{1,4}\.[a-z][a-z0-9_]{0,31}", re.ASCII)  # so that llama.cpp's 63 bytes of name suffice
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME = re.compile(r"[a-z0-9_-]{1,32}", re.ASCII)
_NORM = 1e4  # of a change Delta W; a matrix of a language model has some tens
_WIDEST = 1 << 16  # values of a centroid


@dataclass(frozen=True, slots=True)
class Factors:
    """One matrix' change: Delta W = (alpha / r) b @ a, rows in the order of the GGUF file."""

    a: Floats  # (r, d_in)
    b: Floats  # (d_out, r)

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, slots=True)
class Adapter:
    """`factors` by the matrix' name in the model file without ".weight", such as "blk.3.attn_q"."""

    model: str  # fingerprint (SHA-256) of the model file that it is for
    architecture: str  # general.architecture of that file
    alpha: float
    factors: dict[str, Factors]
    centroid: Floats | None = None  # (d,) mean hidden state of its prompts (normalised), None: unknown

    @property
    def rank(self) -> int:
        """The largest of its factors' ranks."""
        return max(factors.rank for factors in self.factors.values())


def write(adapter: Adapter, path: Path) -> str:
    """Writes the file, whole or not at all, and returns the adapter's id. The same adapter gives the same bytes.

    Raises BadAdapter if `parse` would refuse it (what float16 can't hold included), StoreError if it cannot be written.
    """
    _check_values(adapter)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _put(adapter, written)
            raw = written.read_bytes()
            parse(raw)
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.replace(path)
        finally:
            written.unlink(missing_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path}: the adapter cannot be written: {error.strerror}; free some space") from None
    return hashlib.sha256(raw).hexdigest()


def read(path: Path) -> Adapter:
    """Raises BadAdapter: absent, truncated, NaN or infinite, of wrong shapes, or no adapter at all."""
    return parse(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """The file's bytes, unparsed. Raises BadAdapter if it cannot be read or is too large to be an adapter."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BadAdapter(f"{path}: cannot be read: {error.strerror}") from None


def parse(raw: bytes) -> Adapter:
    """The adapter in a file's bytes. Takes memory for twice `raw` at most. Raises BadAdapter."""
    if len(raw) > MOST_BYTES:
        raise BadAdapter(f"an adapter's file has at most {MOST_BYTES:,} bytes")
    try:
        contents = read_contents(io.BytesIO(raw[:_HEADER]))
    except DAMAGED:
        raise BadAdapter("not an adapter's file: its header is damaged or truncated") from None
    _check_keys(contents)
    values = contents.values
    factors = _factors({tensor.name: _matrix(tensor, raw, contents.data) for tensor in _in_place(contents, len(raw))})
    centroid = values.get(_CENTROID)
    adapter = Adapter(
        model=values[_MODEL],
        architecture=values["general.architecture"],
        alpha=values[_ALPHA],
        factors=factors,
        centroid=None if centroid is None else np.array(centroid, np.float32),
    )
    _check_values(adapter)
    return adapter


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises BadAdapter unless every matrix that it changes is in the model and has its shape."""
    for name, factors in adapter.factors.items():
        change = len(factors.b), factors.a.shape[1]
        if shapes.get(name) != change:
            has = "has {} x {}".format(*shapes[name]) if name in shapes else "is not there"
            raise BadAdapter(f"it changes {name} by {change[0]} x {change[1]} values; in the model that {has}")


def shapes_of(model_path: Path) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the model file's matrices, by name without ".weight". Raises BadModelFile."""
    try:
        with model_path.open("rb") as file:
            tensors = read_contents(file).tensors
    except OSError as error:
        raise BadModelFile(f"{model_path}: cannot be read: {error.strerror}") from None
    except DAMAGED:
        raise BadModelFile(f"{model_path}: not a GGUF file, or its header is damaged") from None
    return {
        tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for tensor in tensors
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    }


def permute_rows(w: Floats, heads: int) -> Floats:
    """Rows of q or k from the order of Hugging Face to that of GGUF files of architecture llama.

    Rotary embedding pairs row i of a head with row i + d/2 there, and with row i + 1 here. `heads` is the number of
    heads that the matrix has (k: of key-value heads). Only rows move: of the factors, b's.
    """
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute_rows(w: Floats, heads: int) -> Floats:
    """The way back."""
    return w.reshape(heads, len(w) // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _put(adapter: Adapter, path: Path) -> None:
    from gguf import GGUFWriter  # slow to import, and only who trains or aggregates writes

    writer = GGUFWriter(path, adapter.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(_ALPHA, adapter.alpha)
    writer.add_string(_MODEL, adapter.model)
    if adapter.centroid is not None:
        writer.add_array(_CENTROID, [float(value) for value in adapter.centroid])
    with np.errstate(over="ignore"):  # parse says it
        for name, factors in sorted(adapter.factors.items()):
            writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(factors.a, np.float16))
            writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(factors.b, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_keys(contents: Contents) -> None:
    values, kinds = contents.values, contents.kinds
    for key, kind in kinds.items():
        if _KINDS.get(key, kind) != kind or not (key in _KINDS or key.startswith(_OURS)):
            raise BadAdapter(f"the adapter's header has an unexpected key or type: {key[:64]!r}")
    missing = _KINDS.keys() - values.keys() - {_CENTROID}
    if missing:
        raise BadAdapter(f"the adapter's header lacks {min(missing)}: only adapters that Skerry wrote can be used")
    if (values["general.type"], values["adapter.type"]) != ("adapter", "lora"):
        raise BadAdapter("a GGUF file, but of no LoRA adapter")


def _in_place(contents: Contents, length: int) -> list[Tensor]:
    """The tensors, which must lie one behind the other in the file and end with it, as llama.cpp wants them."""
    at = 0
    for tensor in contents.tensors:
        if len(tensor.shape) != 2 or tensor.kind != _FLOAT16 or tensor.offset != at:
            raise BadAdapter("the adapter's tensors are not float16 matrices one behind the other")
        at += -(-2 * math.prod(tensor.shape) // ALIGNMENT) * ALIGNMENT
    if contents.data + at != length:
        raise BadAdapter(f"the adapter's file has {length:,} bytes where its header says {contents.data + at:,}")
    return contents.tensors


def _matrix(tensor: Tensor, raw: bytes, data: int) -> Floats:
    values = np.frombuffer(raw, "<f2", math.prod(tensor.shape), data + tensor.offset)
    return values.reshape(tensor.shape).astype(np.float32)


def _factors(matrices: Mapping[str, Floats]) -> dict[str, Factors]:
    """The pairs. Raises BadAdapter where one half is missing or the halves do not go together."""
    names = sorted({name.removesuffix(".weight.lora_a").removesuffix(".weight.lora_b") for name in matrices})
    if not names or len(matrices) != 2 * len(names):
        raise BadAdapter("the adapter's matrices do not come in pairs")
    factors = {}
    for name in names:
        a, b = (matrices.get(f"{name}.weight.lora_{half}") for half in "ab")
        if a is None or b is None or not _MATRIX.fullmatch(name):
            raise BadAdapter("the adapter has a matrix that is none of a model's layers")
        factors[name] = Factors(a, b)
    return factors


def _check_values(adapter: Adapter) -> None:
    if not _HASH.fullmatch(adapter.model) or not _NAME.fullmatch(adapter.architecture):
        raise BadAdapter("the adapter names no model")
    if not 0.0 < adapter.alpha < math.inf:
        raise BadAdapter("the adapter's alpha is no positive number")
    for name, factors in adapter.factors.items():
        a, b = factors.a.shape, factors.b.shape
        if a[0] != b[1] or not 1 <= a[0] <= MOST_RANK or not a[1] or not b[0]:
            raise BadAdapter(f"{name}: A is {a} and B is {b}, which is no change of rank 1 to {MOST_RANK}")
        norm = adapter.alpha / factors.rank * _norm(factors.a) * _norm(factors.b)
        if not norm <= _NORM:  # NaN too
            raise BadAdapter(f"{name}: the change is larger than any that training makes, or not a number")
    centroid = adapter.centroid
    if centroid is not None and not (0 < len(centroid) <= _WIDEST and 0.0 < _norm(centroid) < math.inf):
        raise BadAdapter("the adapter's centroid is no direction")


def _norm(values: Floats) -> float:
    """Frobenius norm; an upper bound of the change's where multiplied. No BLAS: the engine's thread attaches."""
    flat = values.ravel()
    return math.sqrt(np.einsum("i,i->", flat, flat, dtype=np.float64))
