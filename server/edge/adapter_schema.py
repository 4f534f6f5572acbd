"""The tables of an edge's rounds of adapters, one migration after the other."""

from __future__ import annotations

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from server.edge.round_schema import number_tables

MIGRATIONS = Migrations("skerry.adapters")


@MIGRATIONS()
def first_tables(db: Database) -> None:
    """`offers` has the last one of each device; `arrived`: its file is here, whole and checked; `counted`: the last
    round in which it is part of what was agreed. `traffic`: bytes over HTTP, by the round in which they went.
    `ended`: the last round that did, and what went wrong in it."""
    offer = {"device": str, "round": int, "id": str, "bytes": int, "model": str, "rank": int, "lessons": int}
    rest = {"share": str, "noise": float, "arrived": int, "counted": int}
    db.table("offers").create({**offer, **rest}, pk="device", not_null=[*offer, *rest], strict=True)
    db.table("offers").create_index(["round", "id"])
    db.table("traffic").create({"round": int, "up": int, "down": int}, pk="round", not_null=["up", "down"], strict=True)
    db.table("ended").create({"round": int, "trouble": str}, pk="round", not_null=["trouble"], strict=True)
    number_tables(db)
