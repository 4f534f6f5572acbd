"""The rounds of adapters of an edge as an operator sees them: through the database, whether it is running or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.edge.adapter_combine import Kept
from server.edge.adapter_store import FOLDER, decode_content
from server.edge.number_store import read_state
from server.edge.overview import Rounds, database, rounds_of


@dataclass(frozen=True, slots=True)
class AdapterOverview(Rounds):
    """`devices`: by state of their last offer: known, and of the present round offered, uploaded. `groups`: of the
    present number. `bytes_up`, `bytes_down`: of files, in all rounds that are remembered; `traffic`: by round.
    `trouble`: what went wrong in the last round that ended."""

    known: int
    offered: int
    uploaded: int
    groups: list[Kept]
    traffic: dict[int, tuple[int, int]]
    trouble: str


def adapters_of(folder: Path) -> Path:
    """Where the edge that keeps its rounds in `folder` keeps those of adapters."""
    return folder / FOLDER


def adapter_overview(folder: Path) -> AdapterOverview:
    """Of the edge whose folder it is. Raises StoreError."""
    folder = adapters_of(folder)
    with database(folder) as db:
        state = read_state(db)
        newest = db.execute("SELECT content FROM history ORDER BY number DESC LIMIT 1").fetchone()
        ours = "SELECT count(*), coalesce(sum(arrived), 0) FROM offers WHERE round = ? AND id != ''"
        offered, uploaded = db.execute(ours, (state.round,)).fetchone()
        return AdapterOverview(
            *rounds_of(folder, db, state),
            known=int(db.execute("SELECT count(*) FROM offers").fetchone()[0]),
            offered=offered,
            uploaded=uploaded,
            groups=decode_content(newest[0] if newest else None),
            traffic={round: (up, down) for round, up, down in db.execute("SELECT * FROM traffic ORDER BY round DESC")},
            trouble="".join(trouble for (trouble,) in db.execute("SELECT trouble FROM ended")),
        )
