"""The device's Ed25519 key: what peers know it by."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import StoreError


class Identity:
    """`public`: 32 bytes. Safe to use from several threads."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes(s.Encoding.Raw, s.PublicFormat.Raw)

    def sign(self, data: bytes) -> bytes:
        """64 bytes; `protocol.signing.verify` checks them."""
        return self._key.sign(data)


def identity(path: Path) -> Identity:
    """The key in the file (PEM, PKCS 8, mode 0600), which is made if there is none.

    Raises StoreError if the file is unreadable, damaged or open to others. It is never replaced: peers would take the
    device for a stranger.
    """
    try:
        if not path.exists():
            _make(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        pem = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: the device's key cannot be read or made: {error.strerror}") from None
    if mode & 0o077:
        raise StoreError(f"{path}: others may read the device's key (mode {mode:o}); run: chmod 600 {path}")
    try:
        key = s.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreError(
            f"{path}: not an Ed25519 key; restore it from a backup, or delete it to begin as a new device that its "
            "peers do not know"
        )
    return Identity(key)


def _make(path: Path) -> None:
    """All of the file or nothing, also when the power fails; of two processes that try, one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    written = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(written, path)
        except FileExistsError:
            return
    finally:
        written.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
