"""Where model files live on this machine, and what state they are in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from models.catalog import Catalog, Entry
from models.fingerprint import fingerprint, recall, sidecar
from models.partial import disk_errors, locked, partial_path
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
    if not path.is_file():
        return "partial" if partial_path(path).exists() or wheels_folder(path).exists() else "absent"
    if path.stat().st_size != entry.size:
        return "damaged"
    known = recall(path)
    if known is None:
        return "unverified"
    return "verified" if known == entry.sha256 else "damaged"


def resolve_model(name_or_path: str, places: Places) -> Path:
    """The file of a catalog id, or of a path to a GGUF file, checked.

    A catalog model's content is compared with the catalog's hash (once; then its sidecar answers). Raises
    UnknownModel, or BadModelFile if the file is missing, truncated or something else.
    """
    catalog = Catalog(places.entries)
    if name_or_path in catalog:
        return _checked(catalog.find(name_or_path).entry, places.models)
    path = Path(name_or_path).expanduser()
    if path.suffix != ".gguf" and not path.exists():
        ids = ", ".join(listed.entry.id for listed in catalog)
        raise UnknownModel(f"no model {name_or_path!r}: neither a .gguf file nor a catalog id; ids: {ids}")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise BadModelFile(f"{path}: not a GGUF file")
    return path


def _checked(entry: Entry, folder: Path) -> Path:
    path = folder / entry.file
    try:
        size = path.stat().st_size
        if size != entry.size:
            problem = f"has {size:,} bytes instead of {entry.size:,}"
        elif fingerprint(path) != entry.sha256:
            problem = "has another content than the catalog names"
        else:
            return path
    except FileNotFoundError:
        raise BadModelFile(f"{entry.id} is not pulled yet: run `skerry models pull {entry.id}`") from None
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    raise BadModelFile(f"{path} {problem}: run `skerry models pull {entry.id}`")


def remove_files(entry: Entry, folder: Path) -> list[Path]:
    """Removes the model's file and what pulls left of it; returns what was there. Raises PullLocked during a
    pull."""
    path = folder / entry.file
    candidates = (path, sidecar(path), partial_path(path), wheels_folder(path))
    if not any(candidate.exists() for candidate in candidates):
        return []
    with locked(path), disk_errors(path):
        there = [candidate for candidate in candidates if candidate.exists()]
        for candidate in there:
            if candidate.is_dir():
                shutil.rmtree(candidate)
            else:
                candidate.unlink()
        return there
