"""SHA-256 of a model file, remembered next to it so that the second question costs nothing.

The sidecar `<file>.sha256.json` holds size and modification time of the file it speaks of; once either
differs it is worthless and the file is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec


class Sidecar(msgspec.Struct, frozen=True):
    size: int  # bytes
    mtime_ns: int
    sha256: str


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256.json")


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) of the file: from the sidecar where that still holds, else by reading the file.

    Raises OSError if the file cannot be read.
    """
    return recall(path) or measure(path)


def measure(path: Path) -> str:
    """SHA-256 (hex) by reading the whole file, and remembers it. Raises OSError if the file cannot be
    read."""
    before = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
        remember(path, digest)
    return digest


def recall(path: Path) -> str | None:
    """What the sidecar says, None if there is none or the file has changed since. Raises OSError if there is
    no file."""
    stat = path.stat()
    try:
        known = msgspec.json.decode(sidecar(path).read_bytes(), type=Sidecar)
    except (OSError, msgspec.DecodeError):
        return None
    return known.sha256 if (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns) else None


def remember(path: Path, sha256: str) -> None:
    """Writes the sidecar, whole or not at all. In a read-only folder nothing is remembered."""
    stat = path.stat()
    note = sidecar(path)
    written = note.with_name(f"{note.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            written.write_bytes(msgspec.json.encode(Sidecar(stat.st_size, stat.st_mtime_ns, sha256)))
            written.replace(note)
        finally:
            written.unlink(missing_ok=True)
