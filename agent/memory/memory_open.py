"""Opening a memory, also one whose file is damaged: that is set aside, and the device goes on with an empty one."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from agent.memory.memory_rows import Rows
from agent.memory.memory_state import State
from agent.memory.memory_writer import Change
from agent.memory.store import Store, Write, damaged
from protocol.errors import StoreError
from protocol.memory import Entry

DATABASE = "memory.db"
LOCK = "memory.lock"
_BESIDE = ("", "-wal", "-shm")  # what belongs to a database file

_log = logging.getLogger(__name__)


def open_store(folder: Path, state: State, log_bytes: int) -> tuple[Store, list[Write]]:
    """Fills `state`; returns also what has to be written first. `log_bytes`: of SQLite's log, at rest. Raises
    StoreError if nothing can be opened."""
    path = folder / DATABASE
    try:
        try:
            return _opened(path, state, log_bytes)
        except sqlite3.DatabaseError as error:
            if not damaged(error):
                raise
            _set_aside(folder, state)
            return _opened(path, state, log_bytes)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"the memory in {folder} cannot be opened: {error}; check the disk and its rights") from None


def _opened(path: Path, state: State, log_bytes: int) -> tuple[Store, list[Write]]:
    store = Store(path, log_bytes)
    try:
        return store, state.load(store, path.parent)
    except BaseException:
        store.close()
        raise


def _set_aside(folder: Path, state: State) -> None:
    """Keeps one damaged database, the latest."""
    for suffix in _BESIDE:
        path = folder / f"{DATABASE}{suffix}"
        if path.exists():
            path.replace(folder / f"damaged-{path.name}")
    state.counts.damaged_files += 1
    _log.error("the memory's file was damaged: it is now %s, and the memory is empty", folder / f"damaged-{DATABASE}")


def start_over(
    store: Store, state: State, discard: Callable[[], list[Change]]
) -> tuple[Store, list[Entry], list[Change]]:
    """Replaces a store whose file turned out to be damaged. Returns also the entries that were not durable yet, and
    the changes that were meant for the old one."""
    store.close()
    with state.lock:
        outdated = discard()
        pending = list(state.pending.values())
        state.pending.clear()
        fresh = Rows()
        fresh.serial = state.rows.serial  # ids of the old memory must not mean anything in the new one
        state.rows = fresh
        _set_aside(store.path.parent, state)
        opened, _ = _opened(store.path, state, store.log_bytes)
    return opened, pending, outdated
