"""The memory's tables, one migration after the other. Imported only where a migration is due: sqlite-utils is slow to
load, and an agent starts more often than its schema changes."""

from __future__ import annotations

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

MIGRATIONS = Migrations("skerry.memory")


@MIGRATIONS()
def first_tables(db: Database) -> None:
    """`entries` is narrow, so that ageing and eviction read little; `keys` has what is read for single slots."""
    db.table("spaces").create({"ref": int, "space": bytes, "width": int}, pk="ref", strict=True)
    db.table("origins").create(
        {"ref": int, "origin": bytes, "audits": float, "wrong": float, "quarantined": int, "dropped": int},
        pk="ref",
        strict=True,
    )
    db.table("origins").create_index(["origin"], unique=True)
    columns = {"slot": int, "id": int, "space": int, "identity": int, "tail": int, "token": int, "p": float}
    columns |= {"count": int, "time": int, "origin": int, "trust": float, "hits": int, "renewed": int, "used": int}
    db.table("entries").create(columns, pk="slot", not_null=columns.keys(), strict=True)
    db.table("entries").create_index(["identity"], unique=True)
    db.table("keys").create({"slot": int, "key": bytes, "signature": bytes}, pk="slot", strict=True)
    segment = {"ref": int, "space": int, "size": int, "sha256": bytes, "recipe": str, "ids": bytes, "axes": bytes}
    db.table("segments").create(segment, pk="ref", not_null=segment.keys(), strict=True)
    db.table("refused").create({"identity": int, "at": int}, pk="identity", strict=True)
    db.table("state").create({"one": int, "serial": int, "seconds": float, "wall": float}, pk="one", strict=True)
    db.table("state").insert({"one": 1, "serial": 0, "seconds": 0.0, "wall": 0.0})
