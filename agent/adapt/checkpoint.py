"""Training that was cut off goes on where it was last written down: a file that is whole or not there.

Numpy arrays only, nothing is unpickled. What is read back is believed only if it speaks of the same lessons, recipe,
model and start (one digest), and is whole (a checksum, by the archive's own format).
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.errors import TrainingError

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`every`: steps between two writings."""

    path: Path
    every: int = 10

    def save(self, digest: str, step: int, arrays: Arrays) -> None:
        """Whole or not at all, and on the disk when it returns. Raises TrainingError if it cannot be written."""
        made = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            with made.open("wb") as file:
                np.savez(file, allow_pickle=False, digest=np.array(digest), step=np.array(step), **arrays)
                file.flush()
                os.fsync(file.fileno())
            made.replace(self.path)
            _sync(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                made.unlink()
            raise TrainingError(
                f"{self.path}: the state of training cannot be written: {error.strerror}; make room on the disk"
            ) from None

    def load(self, digest: str) -> tuple[int, Arrays] | None:
        """The step it was written after, and what was written; None if there is none for this digest, or it is
        damaged."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            if str(arrays.pop("digest")) != digest:
                return None
            return int(arrays.pop("step")), arrays
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """So that the new name survives a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
