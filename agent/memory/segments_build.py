"""Builds a segment in a process of its own, with the lowest priority.

annoy and the reading of keys would hold Python's lock for milliseconds at a time, and a thread of low priority that
holds it keeps the token loop waiting. A full disk or a crash in here costs the agent nothing, too.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from annoy import AnnoyIndex

from agent.memory.memory_rows import Ids
from agent.memory.segments import AXES, TREES, Vectors
from agent.memory.store_reader import connect

_CHUNK = 2048  # keys projected at once
_SAMPLE = 4096  # keys that the axes are found with
_ITERATIONS = 4


class Order(msgspec.Struct, frozen=True):
    """`ids`: int64, those wanted; `file`: where the segment is written."""

    database: str
    file: str
    space: int
    width: int
    ids: bytes


class Built(msgspec.Struct, frozen=True):
    """`ids`: int64, those that were there, in the order of the items. `axes`: (AXES, width) float32."""

    ids: bytes
    axes: bytes
    size: int
    sha256: bytes


class BuildFailed(Exception):
    """The process that builds ended without a segment."""


Builder = Callable[[Order], Built]


class ChildBuilder:
    """Calls one at a time. Raises BuildFailed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __call__(self, order: Order) -> Built:
        command = [sys.executable, "-P", "-m", "agent.memory.segments_build"]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        pipe, silent = subprocess.PIPE, subprocess.DEVNULL
        try:
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=silent, env=os.environ | one_thread)
        except OSError as error:
            raise BuildFailed(f"no process to build in: {error.strerror}") from None
        self._child = child
        if self._stopped:
            child.kill()
        with child:
            said, _ = child.communicate(msgspec.msgpack.encode(order))
        if child.returncode != 0:
            raise BuildFailed(f"building ended with status {child.returncode}")
        return msgspec.msgpack.decode(said, type=Built)

    def stop(self) -> None:
        """What is being built fails, and all that is asked for later."""
        self._stopped = True
        if self._child is not None:
            self._child.kill()


def build(order: Order) -> Built:
    """The file is complete and on the disk, under its temporary name, when this returns."""
    wanted = np.frombuffer(order.ids, np.int64)
    forest = AnnoyIndex(AXES, "angular")
    forest.set_seed(1)
    found: list[int] = []
    with closing(connect(Path(order.database))) as connection:
        axes = principal_axes(np.concatenate([keys for _, keys in _read(connection, order, wanted[:: _every(wanted)])]))
        for ids, keys in _read(connection, order, wanted):
            for id, vector in zip(ids, (keys @ axes.T).tolist(), strict=True):
                forest.add_item(len(found), vector)
                found.append(id)
    forest.build(TREES, n_jobs=1)
    forest.save(order.file)
    with open(order.file, "r+b") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").digest()
    return Built(np.array(found, np.int64).tobytes(), axes.tobytes(), os.path.getsize(order.file), digest)


def _every(wanted: Ids) -> int:
    return -(-len(wanted) // _SAMPLE)


def _read(connection: sqlite3.Connection, order: Order, wanted: Ids) -> Iterator[tuple[list[int], Vectors]]:
    """Ids (n) and keys (n, width) of length 1, some thousand at a time."""
    rows = connection.execute(
        "SELECT e.id, k.key FROM entries e JOIN keys k USING (slot) WHERE e.space = ? AND length(k.key) = ?",
        (order.space, order.width),
    )
    yield [], np.empty((0, order.width), np.float32)
    while chunk := rows.fetchmany(_CHUNK):
        ids = np.array([id for id, _ in chunk], np.int64)
        keys = np.frombuffer(b"".join(key for _, key in chunk), np.int8).reshape(-1, order.width).astype(np.float32)
        mine = np.isin(ids, wanted)
        yield ids[mine].tolist(), keys[mine] / np.linalg.norm(keys[mine], axis=1, keepdims=True)


def principal_axes(keys: Vectors) -> Vectors:
    """(AXES, width) that span the directions in which keys (n, width) are longest: subspace iteration (Halko,
    Martinsson and Tropp, 2011, algorithm 4.4). With fewer dimensions than axes, the others are 0."""
    width = keys.shape[1]
    axes = np.random.default_rng(1).standard_normal((width, min(AXES, width)), np.float32)
    for _ in range(_ITERATIONS):
        axes = np.linalg.qr(keys.T @ (keys @ axes) + 1e-6 * axes)[0]
    padded = np.zeros((AXES, width), np.float32)
    padded[: axes.shape[1]] = axes.T
    return padded


def main() -> None:
    os.nice(19)
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Order)
    sys.stdout.buffer.write(msgspec.msgpack.encode(build(order)))


if __name__ == "__main__":
    main()
