"""Where models live on this machine, each a file or a folder, and what state they are in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from models.catalog import MODEL, Catalog, Entry
from models.engine.open import kind_of
from models.fingerprint import MANIFEST, files_in, fingerprint, hash_file, recall, sidecar, size_of
from models.partial import disk_errors, locked, old_path, partial_path, remove
from models.wheels import wheels_folder
from protocol.errors import BadModelFile, UnknownModel

State = Literal["absent", "partial", "unverified", "verified", "damaged"]
"""unverified: the right size, but the content has not been compared with the catalog's hash since it
changed."""


@dataclass(frozen=True, slots=True)
class Places:
    """`models` holds the files, `entries` a user's own catalog entries."""

    models: Path
    entries: Path

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Places:
        """SKERRY_MODELS names the models' folder; else both are where this system keeps such things for a
        user."""
        named = env.get("SKERRY_MODELS")
        return cls(
            models=Path(named).expanduser() if named else platformdirs.user_data_path("skerry") / "models",
            entries=platformdirs.user_config_path("skerry") / "models.d",
        )


def state(entry: Entry, folder: Path) -> State:
    """At a glance: no file is read."""
    path = folder / entry.file
    if not (path.is_dir() if entry.files else path.is_file()):
        return "partial" if partial_path(path).exists() or wheels_folder(path).exists() else "absent"
    try:
        if size_of(path) != entry.size:
            return "damaged"
        known = recall(path)
    except OSError:  # a folder that the model cannot be: links that leave it, no right to read it
        return "damaged"
    if known is None:
        return "unverified"
    return "verified" if known == entry.sha256 else "damaged"


def is_complete(path: Path, entry: Entry) -> bool:
    """Whether the model is there and is what the catalog names, its manifest too; instant if it was verified
    before and is unchanged."""
    try:
        right = path.is_dir() == bool(entry.files) and size_of(path) == entry.size and fingerprint(path) == entry.sha256
        return right and all(
            hash_file(path / part.path) == part.sha256 for part in entry.files if part.path == MANIFEST
        )
    except OSError:
        return False


def differences(path: Path, entry: Entry) -> list[str]:
    """Which files of a model's folder are missing, changed or not named by the catalog; nothing for a file. Reads all
    of it. Raises OSError."""
    if not (entry.files and path.is_dir()):
        return []
    there = {inside: hash_file(path / inside) for inside in files_in(path)}
    named = {part.path: part.sha256 for part in entry.files}
    return sorted(inside for inside in there.keys() | named.keys() if there.get(inside) != named.get(inside))


def resolve_model(name_or_path: str, places: Places) -> Path:
    """The model of a catalog id, or of a path to a GGUF file or to a folder with an ONNX model, checked.

    A catalog model's content is compared with the catalog's hash (once; then its sidecar answers). Raises
    UnknownModel, or BadModelFile if the model is missing, truncated or something else.
    """
    catalog = Catalog(places.entries)
    if name_or_path in catalog:
        return _checked(catalog.find(name_or_path).entry, places.models)
    path = model_at(Path(name_or_path))
    if path.suffix != ".gguf" and not path.exists():
        ids = ", ".join(listed.entry.id for listed in catalog)
        raise UnknownModel(
            f"no model {name_or_path!r}: neither a .gguf file, a folder with an ONNX model nor a catalog id; ids: {ids}"
        )
    kind_of(path)
    return path


def model_at(path: Path) -> Path:
    """The path of a model as it was typed: a folder with an ONNX model may be named by the model.onnx in it."""
    path = path.expanduser()
    if path.name == MODEL and path.is_file():
        path = path.parent
    return path if path.name not in ("", "..") else path.resolve()


def _checked(entry: Entry, folder: Path) -> Path:
    path = folder / entry.file
    try:
        if (size := size_of(path)) != entry.size:
            problem = f"has {size:,} bytes instead of {entry.size:,}"
        elif path.is_dir() != bool(entry.files) or fingerprint(path) != entry.sha256:
            problem = "has another content than the catalog names"
        else:
            return path
    except FileNotFoundError:
        raise BadModelFile(f"{entry.id} is not pulled yet: run `skerry models pull {entry.id}`") from None
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    raise BadModelFile(f"{path} {problem}: run `skerry models pull {entry.id}`")


def remove_files(entry: Entry, folder: Path) -> list[Path]:
    """Removes the model and what pulls left of it; returns what was there. Raises PullLocked during a pull."""
    path = folder / entry.file
    candidates = (path, sidecar(path), partial_path(path), old_path(path), wheels_folder(path))
    if not any(os.path.lexists(candidate) for candidate in candidates):
        return []
    with locked(path), disk_errors(path):
        there = [candidate for candidate in candidates if os.path.lexists(candidate)]
        for candidate in there:
            remove(candidate)
        return there
