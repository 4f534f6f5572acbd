"""Aggregates the adapters of a round in a process of its own: its memory is bounded and goes back to the system, and
whatever a hostile file does to it ends nothing but this process.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from protocol.adapters import MAX_GROUPS, MAX_RANKS, AdapterGroup, Blob, Strategy, centre_of
from protocol.errors import BadAdapter

if TYPE_CHECKING:
    from server.edge.adapters import Contribution  # slow to load, and only the child needs it

_NICE = 10
_ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the matrices are small, and threads take memory


class Upload(msgspec.Struct, frozen=True):
    device: str
    file: str
    model: str
    rank: int
    lessons: int


class Job(msgspec.Struct, frozen=True):
    """`ranks`: for which blobs are made, besides those of the devices in a group. `before`: devices by group, of the
    last result. `folder`: where blobs go, as <id>.gguf. `memory`: bytes that the process may take. `group`: by
    similarity; else all of a model are one."""

    uploads: list[Upload]
    strategy: Strategy
    ranks: list[int]
    before: list[list[str]]
    folder: str
    memory: int
    group: bool = True


class Kept(msgspec.Struct, frozen=True):
    """A group as it is published, and the devices whose adapters are in it, which is nobody else's business."""

    group: AdapterGroup
    members: list[str] = []


class Result(msgspec.Struct, frozen=True):
    """`refused`: why, by device; `failed`: why a group's adapters have no result together."""

    made: list[Kept]
    refused: dict[str, str]
    failed: list[str] = []


class CombineFailed(Exception):
    """The process ended without a result."""


Combiner = Callable[[Job], Result]


class ChildCombiner:
    """Calls one at a time. Raises CombineFailed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __call__(self, job: Job) -> Result:
        command = [sys.executable, "-P", "-m", "server.edge.adapter_combine"]
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | _ALONE
            )
        except OSError as error:
            raise CombineFailed(f"no process to aggregate in: {error.strerror}") from None
        self._child = child
        if self._stopped:
            child.kill()
        with child:
            said, wrong = child.communicate(msgspec.msgpack.encode(job))
        if child.returncode != 0:
            reason = wrong.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
            raise CombineFailed(f"aggregating ended with status {child.returncode}: {reason}")
        return msgspec.msgpack.decode(said, type=Result)

    def stop(self) -> None:
        """What is under way fails, and all that is asked for later."""
        self._stopped = True
        if self._child is not None:
            self._child.kill()


def combine(job: Job) -> Result:
    """Blobs are on the disk when this returns."""
    by_model: dict[str, list[Upload]] = {}
    for upload in job.uploads:
        by_model.setdefault(upload.model, []).append(upload)
    made: list[Kept] = []
    refused: dict[str, str] = {}
    failed: list[str] = []
    for model, uploads in sorted(by_model.items(), key=lambda item: -len(item[1])):
        of_model = _of_model(job, model, uploads)
        made += of_model.made
        refused |= of_model.refused
        failed += of_model.failed
    made.sort(key=lambda each: -each.group.devices)  # stable: otherwise in the order of those before
    return Result(made[:MAX_GROUPS], refused, failed)


def _of_model(job: Job, model: str, uploads: list[Upload]) -> Result:
    from models.adapter import read
    from server.edge.adapters import Contribution, groups, screen

    told: list[Contribution] = []
    unreadable: dict[str, str] = {}
    architectures: Counter[str] = Counter()
    for each in uploads:
        load = partial(read, Path(each.file))
        try:
            architectures[load().architecture] += 1
            told.append(Contribution(each.device, float(each.lessons), load))
        except BadAdapter as error:
            unreadable[each.device] = str(error)
    if not told:
        return Result([], unreadable)
    sound, refused = screen(told, model, architectures.most_common(1)[0][0], job.strategy)
    result = Result([], unreadable | refused)
    if not sound:
        return result
    by_device = {each.device: each for each in sound}
    of_device = {each.device: each for each in uploads}
    for members in groups(sound, job.before) if job.group else [sorted(by_device)]:
        try:
            result.made.append(_blobs(job, [by_device[device] for device in members], of_device))
        except BadAdapter as error:
            result.failed.append(f"of {len(members)} devices: {error}")
    return result


def _blobs(job: Job, members: list[Contribution], uploads: dict[str, Upload]) -> Kept:
    from models.adapter import write
    from server.edge.adapters import aggregate

    of_group = [uploads[each.device] for each in members]
    ranks = sorted({*(each.rank for each in of_group), *job.ranks})[:MAX_RANKS]
    alpha = Counter(each.load().alpha for each in members).most_common(1)[0][0]
    blobs: dict[int, Blob] = {}
    centre = b""
    for rank, adapter in aggregate(members, job.strategy, ranks, alpha).items():
        written = Path(job.folder) / f"made.{os.getpid()}"
        id = write(adapter, written)
        written.replace(Path(job.folder) / f"{id}.gguf")
        blobs[rank] = Blob(id, (Path(job.folder) / f"{id}.gguf").stat().st_size)
        centre = centre_of(adapter.centroid)
    share: Literal["all", "a"] = "a" if job.strategy == "fedsa" else "all"
    lessons = sum(each.lessons for each in of_group)
    group = AdapterGroup(of_group[0].model, blobs, len(of_group), lessons, share, centre)
    return Kept(group, sorted(each.device for each in members))


def main() -> None:
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job)
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_DATA, (job.memory, job.memory))
    sys.stdout.buffer.write(msgspec.msgpack.encode(combine(job)))


if __name__ == "__main__":
    main()
