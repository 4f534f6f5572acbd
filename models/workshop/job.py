"""What every step of the workshop is given, and how its result appears: whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.fingerprint import MANIFEST
from models.workshop import manifest
from models.workshop.child import Say
from models.workshop.manifest import Manifest
from protocol.errors import ConfigError, DiskFull, WorkshopError


@dataclass(frozen=True, slots=True)
class Job:
    """`free_space`: bytes that a folder's disk has left."""

    env: Mapping[str, str]
    say: Say = lambda line: None
    free_space: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


@contextmanager
def making(target: Path, needed: int, job: Job) -> Iterator[Path]:
    """A folder to work in beside `target`, which goes afterwards. Raises ConfigError if there is something already,
    DiskFull if `needed` bytes are not free."""
    if target.exists():
        raise ConfigError(f"{target} is there already: remove it, or name another place")
    work = target.with_name(f".{target.name}.{os.getpid()}")
    for left in target.parent.glob(f".{target.name}.*"):
        if left.suffix[1:].isdigit() and not Path(f"/proc/{left.suffix[1:]}").exists():
            shutil.rmtree(left, ignore_errors=True)  # of a command that was killed
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = job.free_space(target.parent)
        if free < needed:
            raise DiskFull(f"this needs some {needed / 1e9:.1f} GB in {target.parent}, {free / 1e9:.1f} GB are free")
        work.mkdir()
    except OSError as error:
        raise WorkshopError(f"{target.parent} cannot be written: {error.strerror}") from None
    try:
        yield work
    except OSError as error:
        raise WorkshopError(f"{target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(out: Path, target: Path, made: Manifest) -> None:
    """Gives a finished folder its manifest and its name. Everybody may read it: onnx keeps what it writes from other
    users, and an agent often is one."""
    manifest.write(out / MANIFEST, made)
    for file in out.iterdir():
        file.chmod(0o644)
    out.replace(target)
