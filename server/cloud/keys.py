"""API keys: made here, shown once, kept as SHA-256 in a file that only its owner may read.

A key is 256 random bits, so a plain hash of it is as hard to invert as the key is to guess.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import platformdirs

from protocol.errors import AuthError, ConfigError

log = logging.getLogger(__name__)

PREFIX = "sk-skerry-"


class Key(msgspec.Struct, frozen=True):
    """`sha256` is of the whole key, in hex; `created` in UTC, ISO 8601."""

    name: str
    sha256: str
    created: str


class _File(msgspec.Struct, frozen=True):
    keys: list[Key] = []


def keys_path(configured: str) -> Path:
    """Where the keys are, by the configuration's `listen.keys_file`."""
    return Path(configured).expanduser() if configured else platformdirs.user_config_path("skerry") / "serve-keys.json"


class KeyFile:
    """The file as the `keys` commands change it. Every method raises ConfigError if it can't be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Key]:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from None
        try:
            return msgspec.json.decode(raw, type=_File).keys
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ConfigError(f"{self.path}: not a key file; move it away and add the keys again") from None

    def add(self, name: str) -> str:
        """The new key. Raises ConfigError if the name is taken."""
        with self._locked():
            keys = self.entries()
            if any(key.name == name for key in keys):
                raise ConfigError(f"there is a key {name!r} already: revoke it first, or choose another name")
            secret = PREFIX + secrets.token_urlsafe(32)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            self._write([*keys, Key(name, _digest(secret), created)])
        return secret

    def revoke(self, name: str) -> None:
        """Raises AuthError if there is no such key."""
        with self._locked():
            keys = self.entries()
            left = [key for key in keys if key.name != name]
            if len(left) == len(keys):
                raise AuthError(f"there is no key {name!r}; `skerry serve keys list` names them")
            self._write(left)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time. The lock is the folder's, since the file itself is replaced."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                yield
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}") from None

    def _write(self, keys: list[Key]) -> None:
        written = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(_File(keys))) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            written.replace(self.path)
        finally:
            written.unlink(missing_ok=True)


class Keys:
    """The keys of a running server: read again whenever the file changes.

    No file means no keys, and whoever may connect may ask. Once there has been a file a key is needed for good, so that
    revoking the last one, or losing the file, opens nothing.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file is there and can't be read."""
        self._file = KeyFile(path)
        self._seen = self._state()
        self._keys = self._file.entries()
        self.required = self._seen is not None

    def check(self, secret: str | None) -> Key | None:
        """The key that `secret` is; None if none is needed and none was given. Raises AuthError.

        Takes the same time for every wrong key.
        """
        self._reload()
        if secret is None:
            if self.required:
                raise AuthError("a key is needed: send `Authorization: Bearer <key>`")
            return None
        presented = _digest(secret)
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, presented)]
        if not found:
            raise AuthError("the key is wrong or was revoked: ask the operator for another one")
        return found[0]

    def holds(self, key: Key | None) -> bool:
        """Whether what `check` returned before would still be returned."""
        self._reload()
        return key in self._keys if key is not None else not self.required

    def _reload(self) -> None:
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        self.required = self.required or state is not None
        try:
            self._keys = self._file.entries()
        except ConfigError as error:
            log.error("no key is valid: %s", error)
            self._keys = []

    def _state(self) -> tuple[int, int, int] | None:
        try:
            stat = self._file.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
