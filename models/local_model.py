"""What a model on this machine says of itself, for its catalog entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.catalog import Part
from models.engine.open import kind_of
from models.fingerprint import MANIFEST, files_in, fingerprint_of_parts, hash_file, measure
from models.gguf_header import read_header
from models.hf_config import read_config, read_json
from protocol.errors import BadModelFile

_FROM_MANIFEST = {"architecture": str, "quantisation": str, "licence": str, "context": int}


def facts_of(path: Path) -> dict[str, Any]:
    """The fields of a catalog entry that can be read from a GGUF file or from a folder with an ONNX model.

    Raises BadModelFile.
    """
    try:
        return _facts_of_folder(path) if kind_of(path) == "onnx" else _facts_of_file(path)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None


def _facts_of_file(path: Path) -> dict[str, Any]:
    header = read_header(path)
    facts = {
        "licence": header.licence,
        "architecture": header.architecture,
        "quantisation": header.quantisation,
        "size": path.stat().st_size,
        "sha256": measure(path),
    }
    return facts | ({"context": header.context} if header.context else {})


def _facts_of_folder(folder: Path) -> dict[str, Any]:
    """The manifest knows more than the configuration that came with the model, so it goes first."""
    config = read_config(folder)
    facts: dict[str, Any] = {"architecture": config.architecture}
    if config.context:
        facts["context"] = config.context
    if (folder / MANIFEST).exists():
        facts |= _facts_of_manifest(folder / MANIFEST)
    parts = [Part(inside, (folder / inside).stat().st_size, hash_file(folder / inside)) for inside in files_in(folder)]
    return facts | {
        "size": sum(part.size for part in parts),
        "sha256": fingerprint_of_parts((part.path, part.sha256) for part in parts),
        "files": [{"path": part.path, "size": part.size, "sha256": part.sha256} for part in parts],
    }


def _facts_of_manifest(path: Path) -> dict[str, Any]:
    manifest = {key: value for key, value in read_json(path).items() if key in _FROM_MANIFEST and value is not None}
    for key, value in manifest.items():
        if not isinstance(value, _FROM_MANIFEST[key]) or isinstance(value, bool):
            raise BadModelFile(f"{path}: {key} is {value!r}, expected {_FROM_MANIFEST[key].__name__}")
    return manifest
