"""Small files that are whole or not there: written durably, and with a checksum where a flipped bit would matter."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from models.partial import fsync_folder
from protocol.errors import StoreError

_DIGEST = 64  # hex digits of a SHA-256


def put(path: Path, raw: bytes) -> None:
    """The old content or the new one, also when the power fails. Raises StoreError; the old content stays then."""
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with written.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            written.replace(path)
            fsync_folder(path.parent)
        finally:
            written.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; free some space, or check the disk") from None


def tell(path: Path, raw: bytes) -> None:
    """Whole for whoever reads it meanwhile; not for the next power cut. Raises OSError."""
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_bytes(raw)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def sealed(body: bytes) -> bytes:
    """With its checksum before it."""
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unsealed(raw: bytes) -> bytes | None:
    """None: damaged."""
    digest, body = raw[:_DIGEST], raw[_DIGEST + 1 :]
    return body if digest == hashlib.sha256(body).hexdigest().encode() else None
