"""What a made model was made from, with what and how: `manifest.json` in its folder, `<file>.manifest.json` beside a
GGUF file. Its catalog entry is made from it (`skerry models add --file`)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from models.engine.open import open_tokenizer
from models.fingerprint import MANIFEST, files_in, hash_file
from models.hf_config import read_config
from protocol.errors import BadModelFile

TOOLS = ("skerry", "llama-cpp-python", "onnxruntime")  # that every step may have used


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`context` in tokens; `inputs` and `outputs`: SHA-256 by file name; `tools`: versions by package; `tokenizer`: its
    fingerprint; `checks`: what was measured of the result; `parent`: of what it was made from, if that had one."""

    action: str
    architecture: str
    quantisation: str
    licence: str
    context: int | None
    tokenizer: str
    parameters: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    tools: dict[str, str]
    checks: dict[str, float] = {}
    parent: Manifest | None = None


def of_folder(
    out: Path,
    source: Path,
    *,
    action: str,
    quantisation: str,
    licence: str,
    parameters: dict[str, Any],
    packages: Iterable[str],
    checks: dict[str, float] | None = None,
    parent: Manifest | None = None,
) -> Manifest:
    """Of the ONNX model in `out`, made of `source`; `packages`: that took part. Raises BadModelFile, UnsafePath."""
    config = read_config(out)
    return Manifest(
        action=action,
        architecture=config.architecture,
        quantisation=quantisation,
        licence=licence,
        context=config.context,
        tokenizer=open_tokenizer(out).fingerprint,
        parameters=parameters,
        inputs=hashes(source),
        outputs=hashes(out),
        tools=versions((*TOOLS, *packages)),
        checks=checks or {},
        parent=parent,
    )


def write(path: Path, manifest: Manifest) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def read(folder_or_file: Path) -> Manifest | None:
    """Of a model; None if it came without. Raises BadModelFile if it is damaged."""
    path = path_of(folder_or_file)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise BadModelFile(f"{path}: not a manifest: {error}; remove it") from None


def path_of(folder_or_file: Path) -> Path:
    if folder_or_file.is_dir():
        return folder_or_file / MANIFEST
    return folder_or_file.with_name(f"{folder_or_file.name}.{MANIFEST}")


def hashes(folder_or_file: Path) -> dict[str, str]:
    """SHA-256 of a file, or of each file of a folder but its manifest."""
    if not folder_or_file.is_dir():
        return {folder_or_file.name: hash_file(folder_or_file)}
    return {inside: hash_file(folder_or_file / inside) for inside in files_in(folder_or_file) if inside != MANIFEST}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
