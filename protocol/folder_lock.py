"""One process at a time uses a folder: a lock that ends with its holder, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from protocol.errors import StoreError, StoreInUse


class FolderLock:
    """Held from construction to `close`, through the file `name` in the folder. `what`: for messages, as `the edge's`;
    `setting`: the key that names the folder. Raises StoreError if it cannot be written, StoreInUse if another process
    has it."""

    def __init__(self, folder: Path, name: str, what: str, setting: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{what} folder {folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = _read(self._descriptor) or "unknown"
            os.close(self._descriptor)
            raise StoreInUse(
                f"{what} folder {folder} is in use by process {process}: stop it, or choose another one ({setting})"
            ) from None
        os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only the number of its holder is missing
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def holder(folder: Path, name: str) -> int | None:
    """The process that uses the folder, if one does."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    finally:
        os.close(descriptor)
    return None


def _read(descriptor: int) -> int | None:
    found = os.pread(descriptor, 20, 0).decode("ascii", "replace")
    return int(found) if found.isdecimal() else None
