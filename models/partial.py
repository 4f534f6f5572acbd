"""A model while it is being fetched: `<file>.partial` next to its destination, hashed as it grows.

It becomes visible under its own name only when size and hash are right, by an atomic rename. Nobody but the
holder of `locked` touches it. Of a model that is a folder `<file>.partial` is a folder too, whose files grow in
the same way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from protocol.errors import DiskFull, HashMismatch, PullError, PullLocked, ReadOnlyFolder

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_CHUNK = 1 << 20  # bytes


def partial_path(destination: Path) -> Path:
    return destination.with_name(destination.name + ".partial")


def old_path(destination: Path) -> Path:
    """Where a folder waits that a new one takes the place of."""
    return destination.with_name(destination.name + ".old")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about `path` into DiskFull, ReadOnlyFolder or PullError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"no space left for {path} ({error.strerror}); free some and pull again") from None
        if error.errno in _FORBIDDEN:
            raise ReadOnlyFolder(
                f"{path} cannot be written ({error.strerror}); make the folder writable or choose another one"
            ) from None
        raise PullError(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Holds the only right to fetch `destination`. The lock ends with its process, however that ends.

    Raises PullLocked if another process holds it, ReadOnlyFolder or DiskFull if the folder can't take the
    lock file.
    """
    path = destination.with_name(destination.name + ".lock")
    descriptor = _lock(path)
    try:
        with disk_errors(path):
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder that is done removes the file: what was opened may be gone before it was locked.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode("ascii", "replace") or "unknown"
            os.close(descriptor)
            raise PullLocked(f"process {holder} is working on {path.stem}; wait until it has finished") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


class Partial:
    """The growing file. Opening it hashes what an earlier, interrupted pull has left.

    `expected` is the size in bytes that the catalog promises; more is refused as it comes in.
    """

    def __init__(self, destination: Path, expected: int) -> None:
        self._destination = destination
        self._path = partial_path(destination)
        self._expected = expected
        with disk_errors(self._path):
            # Unbuffered: a full disk shows at the write that met it, not when the file is closed.
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115
            self._take_over()

    def _take_over(self) -> None:
        self._hash = hashlib.sha256()
        self.size = 0
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            self._hash.update(chunk)
            self.size += len(chunk)
        if self.size > self._expected:
            self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Keeps what was fetched, so that the next pull goes on there."""
        self._file.close()
        if self.size == 0:
            self._path.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Appends. Raises HashMismatch on more bytes than promised, DiskFull when they don't fit on the
        disk."""
        if self.size + len(chunk) > self._expected:
            raise HashMismatch(f"sends more than the {self._expected:,} bytes that the catalog names")
        try:
            self._append(memoryview(chunk))
        except DiskFull:
            self.restart()  # gives the disk its space back: others on this device need it too
            raise

    def _append(self, rest: memoryview) -> None:
        with disk_errors(self._path):
            while rest:
                written = self._file.write(rest)
                self._hash.update(rest[:written])
                self.size += written
                rest = rest[written:]

    def restart(self) -> None:
        with disk_errors(self._path):
            self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.size = 0

    def check(self, sha256: str) -> None:
        """Raises HashMismatch unless the content is whole and is what the catalog names."""
        if self.size != self._expected:
            raise HashMismatch(f"is truncated: {self.size:,} of {self._expected:,} bytes")
        if self._hash.hexdigest() != sha256:
            raise HashMismatch(f"has another content: SHA-256 {self._hash.hexdigest()}, the catalog names {sha256}")

    def publish(self) -> None:
        """Gives the file its own name, durably: after a power loss there is the old file or the whole new
        one."""
        with disk_errors(self._destination):
            os.fsync(self._file.fileno())
            self._path.replace(self._destination)
            fsync_folder(self._destination.parent)


def publish_folder(destination: Path) -> None:
    """Gives the folder `<file>.partial`, whose files are all published, its own name, durably.

    What has that name is moved away first (a folder cannot be replaced in one step) and removed at the end. A
    power loss in between leaves the whole new folder, which the next pull finds.
    """
    staging, old = partial_path(destination), old_path(destination)
    with disk_errors(destination):
        for folder, _, _ in os.walk(staging, topdown=False):
            fsync_folder(Path(folder))
        remove(old)
        if os.path.lexists(destination):
            destination.rename(old)
        try:
            staging.rename(destination)
        except OSError:
            if os.path.lexists(old):
                old.rename(destination)
            raise
        fsync_folder(destination.parent)
    with contextlib.suppress(OSError):  # the model is there; what stays of the old one the next pull removes
        remove(old)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
