"""What is in a memory's folder, read beside the agent that may be using it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from agent.memory.memory_bounds import disk_bytes
from agent.memory.memory_open import DATABASE, LOCK
from agent.memory.memory_stats import OriginStats
from agent.memory.store import SCHEMA
from agent.memory.store_reader import connect
from protocol.errors import StoreError
from protocol.folder_lock import holder


@dataclass(frozen=True, slots=True)
class SpaceOverview:
    space: bytes
    width: int
    entries: int
    segments: int


@dataclass(frozen=True, slots=True)
class Overview:
    """`process`: who is using it, None if nobody. `age_s`: the memory's own clock."""

    entries: int
    spaces: list[SpaceOverview]
    origins: list[OriginStats]
    disk_bytes: int
    age_s: float
    process: int | None


def database(folder: Path) -> Path:
    """Raises StoreError if there is no memory that this program can read."""
    path = folder / DATABASE
    if not path.is_file():
        raise StoreError(f"no memory in {folder}: nothing has been learned there yet")
    try:
        with closing(connect(path)) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    if version != SCHEMA:
        raise StoreError(f"{path} has schema {version}, this Skerry reads {SCHEMA}: start the agent once, or update")
    return path


def overview(folder: Path) -> Overview:
    """Raises StoreError."""
    path = database(folder)
    try:
        with closing(connect(path)) as connection:
            connection.execute("BEGIN")  # all of one moment
            spaces = connection.execute(
                "SELECT s.space, width, count(slot), (SELECT count(*) FROM segments g WHERE g.space = s.ref)"
                " FROM spaces s LEFT JOIN entries e ON e.space = s.ref GROUP BY s.ref"
            ).fetchall()
            origins = connection.execute(
                "SELECT o.origin, count(slot), audits, wrong, quarantined, dropped"
                " FROM origins o LEFT JOIN entries e ON e.origin = o.ref GROUP BY o.ref"
            ).fetchall()
            ((age,),) = connection.execute("SELECT seconds FROM state").fetchall()
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    return Overview(
        entries=sum(row[2] for row in spaces),
        spaces=[SpaceOverview(*row) for row in spaces],
        origins=[
            OriginStats(origin, count, audits, wrong, bool(quarantined), dropped)
            for origin, count, audits, wrong, quarantined, dropped in origins
        ],
        disk_bytes=disk_bytes(folder),
        age_s=age,
        process=holder(folder, LOCK),
    )
