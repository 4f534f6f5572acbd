"""SHA-256 of a model, remembered next to it so that the second question costs nothing.

A model is one file, or a folder of files: then it is the hash over a list of the files' hashes and names. Hidden
files and the manifest (which tells how the model was made) are no part of that.

The sidecar `<model>.sha256.json` holds size and modification time of every file it speaks of; once one of them
differs it is worthless and the files are read again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

MANIFEST = "manifest.json"


class Sidecar(msgspec.Struct, frozen=True):
    """What is remembered of a file."""

    size: int  # bytes
    mtime_ns: int
    sha256: str


class FolderSidecar(msgspec.Struct, frozen=True):
    """What is remembered of a folder: path, bytes and modification time of each file, sorted."""

    files: tuple[tuple[str, int, int], ...]
    sha256: str


def sidecar(path: Path) -> Path:
    return path.parent / f"{path.name}.sha256.json"


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) of the model: from the sidecar where that still holds, else by reading it.

    Raises OSError if it cannot be read.
    """
    return recall(path) or measure(path)


def measure(path: Path) -> str:
    """SHA-256 (hex) by reading the whole model, and remembers it. Raises OSError if it cannot be read."""
    before = _stamped(path, "")
    if isinstance(before, FolderSidecar):
        digest = fingerprint_of_parts((inside, hash_file(path / inside)) for inside, _, _ in before.files)
    else:
        digest = hash_file(path)
    if _stamped(path, "") == before:
        remember(path, digest)
    return digest


def fingerprint_of_parts(parts: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) of a folder whose files have these relative paths and hashes."""
    lines = (f"{sha256}  {path}\n" for path, sha256 in sorted(parts) if path != MANIFEST)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recall(path: Path) -> str | None:
    """What the sidecar says, None if there is none or the model has changed since. Raises OSError if there is
    no model."""
    now = _stamped(path, "")
    try:
        known = msgspec.json.decode(sidecar(path).read_bytes(), type=type(now))
    except (OSError, msgspec.DecodeError):
        return None
    return known.sha256 if msgspec.structs.replace(known, sha256="") == now else None


def remember(path: Path, sha256: str) -> None:
    """Writes the sidecar, whole or not at all. In a read-only folder nothing is remembered."""
    content = msgspec.json.encode(_stamped(path, sha256))
    note = sidecar(path)
    written = note.with_name(f"{note.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            written.write_bytes(content)
            written.replace(note)
        finally:
            written.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of the model, of all its files if it is a folder. Raises OSError."""
    now = _stamped(path, "")
    return now.size if isinstance(now, Sidecar) else sum(size for _, size, _ in now.files)


def files_in(folder: Path) -> list[str]:
    """The relative paths of the folder's files, sorted; hidden ones and what is no file are left out.

    Raises OSError if it cannot be read, and for what is not to be followed or listed: a link that leaves the
    folder or leads to a folder, a name that cannot be printed.
    """
    return sorted(path for path in _walk(folder) if stat.S_ISREG((folder / path).stat().st_mode))


def _walk(folder: Path) -> Iterator[str]:
    for current, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(current, name).is_symlink()]
        for name in links + [name for name in names if not name.startswith(".")]:
            path = Path(current, name).relative_to(folder).as_posix()
            if not path.isprintable():
                raise OSError(errno.EINVAL, f"has a file whose name cannot be printed: {path!a}; rename it")
            if name in links or not _stays(folder / path, folder):
                raise OSError(
                    errno.ELOOP, f"the link {path} leaves the folder or leads to a folder; copy what it names"
                )
            yield path


def _stays(path: Path, folder: Path) -> bool:
    if not path.is_symlink():
        return True
    try:
        return Path(os.path.realpath(path, strict=True)).is_relative_to(os.path.realpath(folder))
    except OSError:  # it names nothing, or itself
        return False


def _stamped(path: Path, sha256: str) -> Sidecar | FolderSidecar:
    """A sidecar for the model as it is now."""
    now = path.stat()
    if not stat.S_ISDIR(now.st_mode):
        return Sidecar(now.st_size, now.st_mtime_ns, sha256)
    stats = [(inside, (path / inside).stat()) for inside in files_in(path)]
    return FolderSidecar(tuple((inside, each.st_size, each.st_mtime_ns) for inside, each in stats), sha256)


def _raise(error: OSError) -> NoReturn:
    raise error
