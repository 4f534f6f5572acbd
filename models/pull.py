"""Getting a model: the sources in order, until one gives exactly what the catalog names.

    already there? -> lock -> room? -> source (resumed) -> size and hash -> rename -> sidecar

Whatever goes wrong, what was there before stays as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.catalog import Entry, check_paths
from models.download import Timeouts
from models.fingerprint import remember
from models.partial import Partial, disk_errors, locked
from models.pull_file import FileJob, Means, Progress
from models.pull_folder import FolderJob
from models.store import is_complete
from models.wheels import wheels_folder


@dataclass(frozen=True, slots=True)
class Pulled:
    """`source` is the title of the source that served the model (a folder may have several), None if it was
    already there; `failed` names what was tried in vain, each with its reason."""

    path: Path
    source: str | None
    failed: tuple[str, ...] = ()


def pull(
    entry: Entry,
    folder: Path,
    *,
    env: Mapping[str, str],
    progress: Progress = lambda source, done, total: None,
    timeouts: Timeouts | None = None,
    free_space: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> Pulled:
    """Fetches the entry's file or folder into `folder`; a complete one is left alone.

    `env` gives HF_ENDPOINT (another hub than the official one) and pip's own variables. Raises PullError:
    DiskFull, ReadOnlyFolder, PullLocked, UnsafePath, or, when every source failed, one that names each with
    its reason (its class is that of the reasons where they agree).
    """
    check_paths(entry, "catalog")
    destination = folder / entry.file
    if is_complete(destination, entry):
        return Pulled(destination, None)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(destination):
        if is_complete(destination, entry):  # by the pull that held the lock until now
            return Pulled(destination, None)
        means = Means(env, timeouts or Timeouts(), free_space)
        if entry.files:
            source, failures = FolderJob(entry, destination, means, progress).fetch()
        else:
            source, failures = _pull_file(entry, destination, means, progress)
        remember(destination, entry.sha256)
        shutil.rmtree(wheels_folder(destination), ignore_errors=True)
    return Pulled(destination, source, tuple(failures))


def _pull_file(entry: Entry, destination: Path, means: Means, progress: Progress) -> tuple[str, list[str]]:
    with Partial(destination, entry.size) as partial:
        served = FileJob(entry, destination, partial, means, progress).try_sources()
        partial.publish()
    return served
