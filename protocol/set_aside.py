"""A damaged database is moved out of the way, and never thrown away."""

from __future__ import annotations

from pathlib import Path


def set_aside(path: Path) -> str:
    """The new name of the SQLite database at `path`, which is free afterwards, with what SQLite kept beside it."""
    aside = path.with_name(path.name + ".damaged")
    if path.exists():
        path.replace(aside)
    for rest in ("-wal", "-shm"):
        path.with_name(path.name + rest).unlink(missing_ok=True)
    return aside.name
