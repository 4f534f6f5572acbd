"""The thread that keeps the index's segments few and whole. It builds in another process (`segments_build`)."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from pathlib import Path

import numpy as np

from agent.memory.index import Merge, plan
from agent.memory.memory_rows import Ids
from agent.memory.memory_state import State
from agent.memory.memory_writer import Change, Writer
from agent.memory.segments import RECIPE, BadSegment, Segment, segment_path
from agent.memory.segments_build import Builder, BuildFailed, Order
from agent.memory.store import SegmentRow, Store
from protocol.errors import StoreError

_PAUSE_S = 30.0  # after a build that failed

_log = logging.getLogger(__name__)


class Merges:
    """`tail_limit`: entries outside of segments at which some are built into one."""

    def __init__(self, folder: Path, state: State, writer: Writer, builder: Builder, tail_limit: int) -> None:
        self._folder = folder
        self._state = state
        self._writer = writer
        self._builder = builder
        self._tail_limit = tail_limit
        self._wake = threading.Condition()
        self._due = True  # something may have to be merged
        self._idle = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="memory-merges", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look(self) -> None:
        """Entries came or went: there may be something to merge. Never waits."""
        with self._wake:
            self._due = True
            self._idle = False
            self._wake.notify_all()

    def settle(self, timeout: float | None = None) -> bool:
        """Waits until nothing is left to merge; False if that takes longer than `timeout` seconds."""
        self.look()
        with self._wake:
            return self._wake.wait_for(lambda: self._idle or self._stopping, timeout)

    def stop(self) -> None:
        """Begins no other merge."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def join(self) -> None:
        """Waits for the merge that is underway; who builds had better be stopped, too."""
        self._thread.join()

    def _run(self) -> None:
        while self._next():
            try:
                self._merge_all()
            except Exception as error:  # whatever it was, the exact tail goes on answering
                self._failed(error)

    def _next(self) -> bool:
        """Waits until there is something to do; False when it is to stop."""
        with self._wake:
            self._idle = not self._due
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._due or self._stopping)
            self._due = False
            return not self._stopping

    def _failed(self, error: Exception) -> None:
        with self._wake:
            if self._stopping:
                return
            self._state.counts.merge_errors += 1
            if isinstance(error, (BuildFailed, sqlite3.Error)):
                self._writer.put(Change(Store.check))  # who builds reads all keys: is one of them damaged?
            expected = isinstance(error, (BuildFailed, BadSegment, StoreError, OSError))
            _log.warning("the memory's index could not be merged: %s", error, exc_info=not expected)
            self._due = True
            self._wake.wait_for(lambda: self._stopping, _PAUSE_S)

    def _merge_all(self) -> None:
        for partition in list(self._state.partitions.values()):
            while not self._stopping:
                merge = plan(partition, self._state.rows, self._tail_limit, self._state.lock)
                if merge is None:
                    break
                self._merge(merge)
                self._state.counts.merges += 1

    def _merge(self, merge: Merge) -> None:
        self._writer.flush()  # who builds reads the database: all of it must be there
        row = self._build(merge) if len(merge.ids) else None
        segment = None
        if row is not None:
            segment = Segment(self._folder, row, merge.partition.width)
            segment.know_tails(self._state.rows.of("tail", segment.ids))
            self._drop_unreadable(np.setdiff1d(merge.ids, segment.ids))
        replaced = [old.row.ref for old in merge.segments]
        self._writer.do(lambda store: store.put_segment(row, replaced))
        merge.partition.install(segment, merge.segments, self._state.lock)
        for ref in replaced:
            segment_path(self._folder, ref).unlink(missing_ok=True)

    def _drop_unreadable(self, ids: Ids) -> None:
        """Entries that were durable, and have no proper key in the database: it was damaged."""
        gone = self._state.drop(ids)
        if len(gone):
            self._writer.put(Change(lambda store: store.delete(gone.tolist()), lambda: self._state.release(gone)))

    def _build(self, merge: Merge) -> SegmentRow | None:
        """A segment's file under its own name, durably."""
        ref = self._state.next_segment
        self._state.next_segment += 1
        path = segment_path(self._folder, ref)
        part = path.with_suffix(f".{os.getpid()}.part")
        width = merge.partition.width
        order = Order(str(self._folder / "memory.db"), str(part), merge.partition.ref, width, merge.ids.tobytes())
        try:
            built = self._builder(order)
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return SegmentRow(ref, merge.partition.ref, built.size, built.sha256, RECIPE, built.ids, built.axes)
