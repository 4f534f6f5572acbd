"""The tables of an edge's rounds, one migration after the other; those of adapters have some of them too."""

from __future__ import annotations

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

MIGRATIONS = Migrations("skerry.rounds")


@MIGRATIONS()
def first_tables(db: Database) -> None:
    """`updates` has the last one of each device and subject, and so says what was heard already; `counted`: the round
    whose aggregate it is in, 0: none yet; `before`: the device's threshold in the update before it."""
    update = {"device": str, "subject": str, "round": int, "base": int, "threshold": float, "evidence": float}
    statistics = {"mean_u": float, "mean_beta": float, "slope": float}
    rest = {"noise": float, "before": float, "counted": int, "accepted": int}
    db.table("updates").create(
        {**update, **statistics, **rest},
        pk=("device", "subject"),
        not_null=[*update, "noise", "counted", "accepted"],
        strict=True,
    )
    db.table("updates").create_index(["counted"])
    db.table("overall").create({"one": int, "number": int, "message": bytes}, pk="one", strict=True)
    number_tables(db)


def number_tables(db: Database) -> None:
    """What `number_store.NumberStore` needs."""
    db.table("releases").create({"device": str, "plain": int, "noisy": int, "spent": float}, pk="device", strict=True)
    db.table("refusals").create({"device": str, "reason": str, "count": int}, pk=("device", "reason"), strict=True)
    db.table("lifts").create({"device": str}, pk="device", strict=True)
    entry = {"number": int, "round": int, "why": str, "of": int, "devices": int, "content": bytes}
    db.table("history").create(entry, pk="number", not_null=entry.keys(), strict=True)
    db.table("orders").create({"id": int, "kind": str, "number": int}, pk="id", strict=True)
    state = {"number": int, "round": int, "collecting": int, "began": float, "ends": float, "next": float}
    state |= {"heard_number": int, "heard_round": int, "floor": int, "held": int, "seconds": float}
    db.table("state").create({"one": int, **state}, pk="one", not_null=state.keys(), strict=True)
    db.table("state").insert({"one": 1, **dict.fromkeys(state, 0)})
