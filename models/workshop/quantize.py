"""The same model with fewer bits: an ONNX folder or a GGUF file becomes another of its kind."""

from __future__ import annotations

import shutil
from pathlib import Path

from models.catalog import MODEL
from models.engine.open import kind_of
from models.fingerprint import MANIFEST, files_in
from models.model_folder import check_folder
from models.workshop import manifest
from models.workshop.child import here, run
from models.workshop.export import licence_of
from models.workshop.job import Job, making, publish
from models.workshop.manifest import Manifest
from models.workshop.quantize_gguf import GGUF_KINDS, quantise_gguf
from protocol.errors import ConfigError

ONNX_KINDS = ("int4", "mixed", "int8", "int8-dynamic")
KINDS = {"onnx": ONNX_KINDS, "gguf": tuple(GGUF_KINDS)}

_PACKAGES = ("onnx", "numpy")


def quantize(source: Path, target: Path, kind: str, job: Job) -> Manifest:
    """Writes `target`. Raises BadModelFile, UnsafePath, WorkshopError, DiskFull, ConfigError."""
    form = kind_of(source)
    if kind not in KINDS[form]:
        raise ConfigError(f"{source} is a model for {form}: it can be quantised to {', '.join(KINDS[form])}")
    if form == "gguf":
        return quantise_gguf(source, target, kind, job)
    return _quantize_onnx(source, target, kind, job)


def _quantize_onnx(source: Path, target: Path, kind: str, job: Job) -> Manifest:
    check_folder(source)
    parent = manifest.read(source)
    weights = sum((source / inside).stat().st_size for inside in files_in(source))
    with making(target, 2 * weights, job) as work:
        out = work / "out"
        out.mkdir()
        for inside in files_in(source):
            if not inside.startswith(MODEL) and inside != MANIFEST:
                shutil.copyfile(source / inside, out / inside)
        arguments = [here(source / MODEL), here(out / MODEL), kind]
        run(f"quantising to {kind}", "models.workshop.onnx_quantize", arguments, env=job.env, say=job.say)
        check_folder(out)
        made = manifest.of_folder(
            out,
            source,
            action="quantize",
            quantisation=kind,
            licence=parent.licence if parent else licence_of(source),
            parameters={"kind": kind},
            packages=_PACKAGES,
            parent=parent,
        )
        publish(out, target, made)
    return made
