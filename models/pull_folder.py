"""Fetching a model that is a folder: file after file into `<file>.partial`, then the folder gets its name at once.

What is right already is not fetched again: files of an interrupted pull, and those of the folder that the new one
is to replace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import msgspec

from models.catalog import Entry, Hub, LocalFile, Part, Source, Url, Wheels
from models.fingerprint import hash_file
from models.partial import Partial, disk_errors, partial_path, publish_folder, remove
from models.pull_file import FileJob, Means, Progress
from models.wheels import bytes_in
from protocol.errors import DiskFull


class FolderJob:
    """The pull of a folder, holding the lock."""

    def __init__(self, entry: Entry, destination: Path, means: Means, progress: Progress) -> None:
        self._entry = entry
        self._destination = destination
        self._staging = partial_path(destination)
        self._means = means
        self._progress = progress
        self._sources = [source for source in entry.sources if not isinstance(source, Wheels)]
        self._used: list[str] = []
        self._failures: list[str] = []

    def fetch(self) -> tuple[str, list[str]]:
        """Returns the titles of the sources that served it, and those that failed with their reasons.

        Raises as FileJob.try_sources does.
        """
        paths = {part.path for part in self._entry.files}
        self._tidy(paths | {f"{path}.partial" for path in paths})
        first = self._means.title(self._sources[0])
        try:
            missing = [part for part in self._entry.files if not self._take_over(part)]
            needed = max(0, self._entry.size - bytes_in(self._staging))
            self._means.make_sure_of_room(self._entry.id, self._destination.parent, needed)
            self._fetch_parts(missing)
            self._tidy(paths)
            publish_folder(self._destination)
        finally:
            self._remove_empty_folders()
        return " and ".join(dict.fromkeys(self._used)) or first, self._failures

    def _fetch_parts(self, missing: list[Part]) -> None:
        done = self._entry.size - sum(part.size for part in missing)
        try:
            for part in missing:
                self._fetch_part(part, done)
                done += part.size
        except DiskFull:
            shutil.rmtree(self._staging, ignore_errors=True)  # as Partial does: others need the space too
            raise

    def _fetch_part(self, part: Part, done: int) -> None:
        """One file, as if it were a model of its own."""
        path = self._staging / part.path
        places: list[Source] = [_part_of(source, part) for source in self._sources]
        folders = dict(zip(map(self._means.title, places), self._sources, strict=True))

        def report(title: str, part_done: int, part_size: int) -> None:
            self._progress(self._means.title(folders[title]), done + part_done, self._entry.size)

        alone = msgspec.structs.replace(self._entry, size=part.size, sha256=part.sha256, sources=places, files=[])
        with Partial(path, part.size) as partial:
            title, failures = FileJob(alone, path, partial, self._means, report, kept=done).try_sources()
            partial.publish()
        self._failures += failures
        served = folders[title]
        self._used.append(self._means.title(served))
        # Who served this file is asked first for the next: a dead source costs its time-out once.
        self._sources.sort(key=lambda source: source is not served)

    def _take_over(self, part: Part) -> bool:
        """Whether the file is there: from an earlier pull, or linked from the folder that is to be replaced."""
        path, old = self._staging / part.path, self._destination / part.path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if _is_part(path, part):
            return True
        if old.is_symlink() or not _is_part(old, part):
            return False
        try:
            path.unlink(missing_ok=True)
            os.link(old, path)
        except OSError:  # a file system without links: it is fetched
            return False
        return True

    def _tidy(self, keep: set[str]) -> None:
        """Leaves no other files in the staging folder: an older catalog may have named them."""
        with disk_errors(self._staging):
            if self._staging.is_symlink() or not self._staging.is_dir():
                remove(self._staging)
            for path in list(self._staging.rglob("*")):
                stays = path.is_file() and path.relative_to(self._staging).as_posix() in keep
                if path.is_symlink() or not (path.is_dir() or stays):
                    path.unlink()
        self._remove_empty_folders()

    def _remove_empty_folders(self) -> None:
        for folder, _, _ in os.walk(self._staging, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _is_part(path: Path, part: Part) -> bool:
    try:
        return path.stat().st_size == part.size and hash_file(path) == part.sha256
    except OSError:
        return False


def _part_of(folder: Hub | Url | LocalFile, part: Part) -> Hub | Url | LocalFile:
    """Where the folder's source has this file of it."""
    match folder:
        case Hub():
            return Hub(folder.repo, (PurePosixPath(folder.file) / part.path).as_posix())
        case Url():
            return Url(f"{folder.url.rstrip('/')}/{quote(part.path)}")
        case LocalFile():
            return LocalFile(str(Path(folder.path) / part.path))
