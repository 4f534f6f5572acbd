"""The rounds of adapters of an edge as an operator sees them: through the database, whether it is running or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from protocol.folder_lock import holder
from server.edge.adapter_combine import Kept
from server.edge.adapter_store import FOLDER, decode_content
from server.edge.folder import LOCK
from server.edge.number_store import Entry, Order, State, history, orders, read_state
from server.edge.overview import database, reasons, refusals


@dataclass(frozen=True, slots=True)
class AdapterOverview:
    """`devices`: by state of their last offer: known, and of the present round offered, uploaded. `groups`: of the
    present number. `bytes_up`, `bytes_down`: of files, in all rounds that are remembered; `traffic`: by round.
    `trouble`: what went wrong in the last round that ended."""

    process: int | None
    state: State
    known: int
    offered: int
    uploaded: int
    groups: list[Kept]
    refusals: dict[str, dict[str, int]]
    traffic: dict[int, tuple[int, int]]
    history: list[Entry]
    orders: list[Order]
    trouble: str

    @property
    def left(self) -> float:
        """Seconds, of the edge's clock."""
        return max(0.0, self.state.ends - self.state.seconds) if self.state.collecting else 0.0

    @property
    def next(self) -> float:
        return math.inf if self.state.held else max(0.0, self.state.next - self.state.seconds)

    def reasons(self) -> dict[str, int]:
        """Refusals of all devices together."""
        return reasons(self.refusals)


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
            process=holder(folder, LOCK),
            state=state,
            known=int(db.execute("SELECT count(*) FROM offers").fetchone()[0]),
            offered=offered,
            uploaded=uploaded,
            groups=decode_content(newest[0] if newest else None),
            refusals=refusals(db),
            traffic={round: (up, down) for round, up, down in db.execute("SELECT * FROM traffic ORDER BY round DESC")},
            history=history(db),
            orders=orders(db),
            trouble="".join(trouble for (trouble,) in db.execute("SELECT trouble FROM ended")),
        )
