"""What a model says about itself and what it lacks for running with Skerry, read without loading it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

from models import parameters
from models.catalog import MODEL
from models.chat import render
from models.engine.base import Tokenizer
from models.engine.open import Kind, kind_of
from models.fingerprint import MANIFEST, size_of
from models.gguf_header import Contents, check_tensors, header_of, stored_bytes
from models.hf_config import FolderConfig, read_config, read_json
from models.model_folder import (
    TYPES,
    Decoder,
    bytes_of,
    check_data,
    check_tokenizer,
    decoder_of,
    read_vocabulary,
)
from models.onnx_header import OnnxGraph, read_graph
from protocol.errors import BadModelFile, RequestError
from protocol.resolve import Message

_GGUF_SIZES = ("block_count", "embedding_length")
_CONTROL = 3  # GGUF's number of that type of token
_INT8 = {"MatMulInteger", "ConvInteger", "com.microsoft:DynamicQuantizeMatMul", "com.microsoft:MatMulIntegerToFloat"}
_LICENCE = re.compile(r"^licen[sc]e:\s*[\"']?([\w.+ -]{1,80})", re.MULTILINE)
_HEAD = 1 << 14  # characters of a text file that are looked at
_NO_TEMPLATE = "it has no chat template, so requests to chat are refused; completions work, or take an instruct model"
_NO_LICENCE = "nothing says under which licence it is; find that out before you pass it on"
_EXPORT = "`skerry models export` makes a model"


@dataclass(frozen=True, slots=True)
class Listed:
    """One tensor. `bytes`: as stored."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What all tensors of one type make."""

    type: str
    tensors: int
    values: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """`size` in bytes of all files, `context` in tokens; what nothing tells is "unknown" or None. `missing` says in
    sentences what the model lacks and what to do about it; `runs`: whether Skerry can run it nevertheless."""

    path: str
    format: Kind
    architecture: str
    quantisation: str
    parameters: int
    size: int
    context: int | None
    vocab: int | None
    layers: int | None
    width: int | None
    tokenizer: str
    tokens: int
    controls: tuple[str, ...]
    template: Literal["works", "fails", "none"]
    licence: str
    cache: str
    hidden_states: bool
    manifest: dict[str, Any] | None
    shares: tuple[Share, ...]
    tensors: tuple[Listed, ...]
    runs: bool
    missing: tuple[str, ...]


def inspect(path: Path) -> Report:
    """Of a GGUF file or of a folder with an ONNX model. Raises BadModelFile, UnsafePath if it is damaged or hostile."""
    if kind_of(path) == "gguf":
        return _inspect_gguf(path)
    try:
        return _inspect_onnx(path, size_of(path))
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None


def _inspect_gguf(path: Path) -> Report:
    contents = check_tensors(path)
    try:
        header = header_of(contents.values)
        tensors = _gguf_tensors(contents)
    except ValueError:
        raise BadModelFile(f"{path}: not a GGUF file, or its header is damaged") from None
    tokens, controls = _gguf_tokens(contents)
    blockers = [] if tokens else ["it has no tokenizer, so no text can be given to it; take a file that has one"]
    if not header.context:
        blockers.append("it does not say how long its context is; take a file that does")
    template, faults = _template(
        _text(contents, "tokenizer.chat_template"), _gguf_token(contents, "bos"), _gguf_token(contents, "eos")
    )
    faults += [_NO_LICENCE] if header.licence == "unknown" else []
    of_architecture = {key: contents.values.get(f"{header.architecture}.{key}") for key in _GGUF_SIZES}
    layers, width = (value if type(value) is int else None for value in of_architecture.values())
    return Report(
        path=str(path),
        format="gguf",
        architecture=header.architecture,
        quantisation=header.quantisation,
        parameters=parameters.of_gguf(contents.tensors),
        size=path.stat().st_size,
        context=header.context,
        vocab=len(tokens) or None,
        layers=layers,
        width=width,
        tokenizer=_text(contents, "tokenizer.ggml.model") or "none",
        tokens=len(tokens),
        controls=controls,
        template=template,
        licence=header.licence,
        cache="llama.cpp's",
        hidden_states=True,
        manifest=None,
        shares=_shares(tensors),
        tensors=tensors,
        runs=not blockers,
        missing=(*blockers, *faults),
    )


def _gguf_tensors(contents: Contents) -> tuple[Listed, ...]:
    from gguf import GGMLQuantizationType  # slow to import

    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    return tuple(
        Listed(one.name, names.get(one.kind, f"type {one.kind}"), one.shape, stored_bytes(one))
        for one in contents.tensors
    )


def _gguf_tokens(contents: Contents) -> tuple[list[str], tuple[str, ...]]:
    """All tokens as written, and the control tokens among them."""
    if contents.kinds.get("tokenizer.ggml.tokens") != "array of string":
        return [], ()
    tokens: list[str] = contents.values["tokenizer.ggml.tokens"]
    kinds = contents.values.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) else []
    return tokens, tuple(token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL)


def _gguf_token(contents: Contents, which: str) -> str:
    tokens, _ = _gguf_tokens(contents)
    id = contents.values.get(f"tokenizer.ggml.{which}_token_id")
    return tokens[id] if isinstance(id, int) and 0 <= id < len(tokens) else ""


def _text(contents: Contents, key: str) -> str | None:
    value = contents.values.get(key)
    return value if isinstance(value, str) else None


def _inspect_onnx(path: Path, size: int) -> Report:
    graph = read_graph(path / MODEL)
    check_data(path, graph)
    config = read_config(path)
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).exists() else None
    licence = _licence(path, manifest)
    decoder, blockers = _decoder(path, graph)
    kind, tokens, controls, more = _vocabulary(path, decoder)
    template, faults = _template(config.template, config.begin, config.end)
    faults += _shortcomings(decoder, config) + ([_NO_LICENCE] if licence == "unknown" else [])
    tensors = _onnx_tensors(graph)
    return Report(
        path=str(path),
        format="onnx",
        architecture=config.architecture,
        quantisation=_quantisation(graph, tensors),
        parameters=parameters.of_onnx(graph, decoder.vocab if decoder else 0),
        size=size,
        context=config.context,
        vocab=decoder.vocab if decoder else None,
        layers=decoder.layers if decoder else None,
        width=decoder.width if decoder else None,
        tokenizer=kind,
        tokens=tokens,
        controls=controls,
        template=template,
        licence=licence,
        cache=_cache(decoder),
        hidden_states=decoder is not None and decoder.hidden,
        manifest=manifest,
        shares=_shares(tensors),
        tensors=tensors,
        runs=not blockers + more,
        missing=(*blockers, *more, *faults),
    )


def _decoder(path: Path, graph: OnnxGraph) -> tuple[Decoder | None, list[str]]:
    try:
        return decoder_of(path, graph), []
    except BadModelFile as error:
        return None, [_without(path, error)]


def _vocabulary(path: Path, decoder: Decoder | None) -> tuple[str, int, tuple[str, ...], list[str]]:
    """The tokenizer's algorithm, its number of tokens, its control tokens, and what is wrong with it."""
    try:
        found = read_vocabulary(path)
    except BadModelFile as error:
        return "none", 0, (), [_without(path, error)]
    wrong = []
    try:
        if decoder:
            check_tokenizer(path, decoder.vocab)
    except BadModelFile as error:
        wrong.append(_without(path, error))
    return found.kind, found.ids, found.controls, wrong


def _without(path: Path, error: BadModelFile) -> str:
    """The message without the folder, which the reader named."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")


def _shortcomings(decoder: Decoder | None, config: FolderConfig) -> list[str]:
    found = []
    if decoder and not decoder.hidden:
        found.append(f"it gives no hidden states, so the agent's memory must be off; {_EXPORT} that does")
    if decoder and not decoder.last_only:
        found.append(f"it computes logits for every token of a prompt, which takes time and memory; {_EXPORT} without")
    if decoder and not decoder.shared:
        found.append(f"it copies all keys and values at each step, which slows long texts down; {_EXPORT} without")
    if not config.context:
        found.append("nothing says how long its context is; set model.context to what it was trained for")
    return found


def _cache(decoder: Decoder | None) -> str:
    if decoder is None:
        return "none that is known"
    return "shared (GroupQueryAttention)" if decoder.shared else "grown"


def _quantisation(graph: OnnxGraph, tensors: Iterable[Listed]) -> str:
    blocks = {(node.bits, node.block) for node in graph.blockwise}
    if blocks:
        return ", ".join(f"{bits}-bit in blocks of {block}" for bits, block in sorted(blocks))
    if graph.ops.keys() & _INT8:
        return "int8, dynamic"
    return max(_shares(tensors), key=lambda share: share.bytes, default=Share("unknown", 0, 0, 0)).type


def _onnx_tensors(graph: OnnxGraph) -> tuple[Listed, ...]:
    return tuple(
        Listed(
            name=one.name,
            type=TYPES.get(one.dtype, (f"type {one.dtype}", 0))[0],
            shape=one.shape,
            bytes=one.length or bytes_of(one.dtype, one.shape) or 0,
        )
        for one in graph.initializers
    )


def _licence(path: Path, manifest: dict[str, Any] | None) -> str:
    """From the manifest, the front matter of the model's card, or the first line of a file with the licence."""
    told = (manifest or {}).get("licence")
    if isinstance(told, str) and told:
        return told
    if found := _LICENCE.search(_head(path / "README.md")):
        return found[1].strip()
    lines = (line.strip() for name in ("LICENSE", "LICENSE.txt", "LICENCE") for line in _head(path / name).splitlines())
    return next((line[:80] for line in lines if line), "unknown")


def _head(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_HEAD)


def _shares(tensors: Iterable[Listed]) -> tuple[Share, ...]:
    """Largest first."""
    found: dict[str, Share] = {}
    for one in tensors:
        before = found.get(one.type, Share(one.type, 0, 0, 0))
        values = before.values + prod(one.shape)
        found[one.type] = Share(one.type, before.tensors + 1, values, before.bytes + one.bytes)
    return tuple(sorted(found.values(), key=lambda share: -share.bytes))


@dataclass(frozen=True, slots=True)
class _Written:
    """All of a tokenizer that a template is given."""

    template: str | None
    begin: str
    end: str


def _template(template: str | None, begin: str, end: str) -> tuple[Literal["works", "fails", "none"], list[str]]:
    """Whether it turns one question into a prompt."""
    if not template:
        return "none", [_NO_TEMPLATE]
    try:
        render(cast(Tokenizer, _Written(template, begin, end)), [Message("user", "Hello.")])
    except RequestError as error:
        return "fails", [f"{error}; requests to chat are refused, completions work"]
    return "works", []
