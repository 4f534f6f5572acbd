"""A GGUF file with fewer bits, by llama.cpp's own quantiser."""

from __future__ import annotations

import math
from pathlib import Path

from models.engine.threads import physical_cores
from models.fingerprint import hash_file
from models.gguf_header import GgufHeader, check_tensors, header_of, read_header
from models.workshop import manifest
from models.workshop.child import here, run
from models.workshop.job import Job, making
from models.workshop.manifest import Manifest
from protocol.errors import BadModelFile, WorkshopError

GGUF_KINDS = {"q4_0": 4.5, "q4_1": 5.0, "q4_k_m": 4.9, "q5_k_m": 5.7, "q6_k": 6.6, "q8_0": 8.5, "f16": 16.0}
"""Bits per weight, about: small models get more, for llama.cpp keeps embeddings and odd matrices at up to 8.5."""

_FULL = {0, 1, 30}  # ggml's numbers of float32, float16 and bfloat16
_TWICE = "what is rounded twice loses more; begin with an f16 file if there is one"
_LARGER = "as f16 it becomes larger, not better"


def quantise_gguf(source: Path, target: Path, kind: str, job: Job) -> Manifest:
    """Writes `target`, and its manifest beside it. Raises BadModelFile, WorkshopError, DiskFull, ConfigError."""
    contents = check_tensors(source)
    if not contents.values.get("tokenizer.ggml.tokens"):
        raise BadModelFile(f"{source}: has no tokenizer, so it is no model that can be run: take a file that has one")
    rounded = any(tensor.kind not in _FULL for tensor in contents.tensors)
    weights = sum(math.prod(tensor.shape) for tensor in contents.tensors)
    needed = int(weights * max(GGUF_KINDS[kind], GGUF_KINDS["q8_0"]) / 8)
    with making(target, needed, job) as work:
        if rounded:
            job.say(f"{source.name} is {read_header(source).quantisation}: {_LARGER if kind == 'f16' else _TWICE}")
        out = work / "out.gguf"
        arguments = [here(source), here(out), kind, str(physical_cores())]
        run(f"quantising to {kind}", "models.workshop.gguf_quantize", arguments, env=job.env, say=job.say)
        header = _result(out, kind)
        made = Manifest(
            action="quantize",
            architecture=header.architecture,
            quantisation=header.quantisation,
            licence=header.licence,
            context=header.context,
            tokenizer=_same_tokenizer(source, out),
            parameters={"kind": kind},
            inputs=manifest.hashes(source),
            outputs={target.name: hash_file(out)},
            tools=manifest.versions(manifest.TOOLS),
            checks={"bits_per_weight": 8 * out.stat().st_size / weights},
            parent=manifest.read(source),
        )
        manifest.write(manifest.path_of(target), made)  # first: a model never stands there without
        out.replace(target)
    return made


def _result(out: Path, kind: str) -> GgufHeader:
    """Raises WorkshopError if the file is not what was asked for."""
    try:
        header = header_of(check_tensors(out).values)
    except (BadModelFile, ValueError) as error:
        raise WorkshopError(f"what llama.cpp wrote is damaged: {error}") from None
    if header.quantisation != kind.upper():
        raise WorkshopError(f"llama.cpp wrote {header.quantisation} instead of {kind.upper()}")
    return header


def _same_tokenizer(source: Path, out: Path) -> str:
    from models.engine.gguf import GgufTokenizer

    made = GgufTokenizer.open(out).fingerprint
    if made != GgufTokenizer.open(source).fingerprint:
        raise WorkshopError(f"{source}: its vocabulary changed on the way: the result is no good")
    return made
