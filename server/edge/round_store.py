"""What an edge's rounds keep on disk: a number store, and the devices' updates.

An update is committed before it is acknowledged, so it survives the end of the process at any point; it is synced
within a second, or half a minute between rounds, since a sync for each of 10,000 would take longer than their round.
After a power cut the updates of that time may be missing, no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from protocol.rounds import Overall, Update, decode_overall
from server.edge.levels import Kept, Pending
from server.edge.number_store import LATELY, Entry, NumberStore, State

if TYPE_CHECKING:
    from sqlite_utils.migrations import Migrations

REMEMBERED = 1000  # rounds, for which the edge knows whose updates have counted
_DEVICE_SUBJECTS = 8
_SUBJECTS = 256  # of a round: those that most devices speak of; the others wait
_ROWS = 131_072

_ACCEPT = """
INSERT INTO updates (device, subject, round, base, threshold, evidence, mean_u, mean_beta, slope, noise, counted,
                     accepted)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 1)
ON CONFLICT (device, subject) DO UPDATE SET
    round = excluded.round, base = excluded.base, before = threshold, threshold = excluded.threshold,
    evidence = excluded.evidence, mean_u = excluded.mean_u, mean_beta = excluded.mean_beta, slope = excluded.slope,
    noise = excluded.noise, counted = 0, accepted = accepted + 1
WHERE excluded.round > round
"""


class RoundStore(NumberStore):
    @staticmethod
    def _migrations() -> Migrations:
        from server.edge.round_schema import MIGRATIONS

        return MIGRATIONS

    def _count(self) -> None:
        super()._count()
        self._rows = self._value("SELECT count(*) FROM updates")

    # Updates

    def accept(self, device: str, update: Update) -> str | None:
        """Keeps it; or the name of the reason not to (`admission.REASONS`). Either way it is in the epsilon ledger."""
        self._db.execute("BEGIN IMMEDIATE")  # without a sync
        try:
            reason = self._kept(device, update)
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
                self._count()
        return reason

    def _kept(self, device: str, update: Update) -> str | None:
        """In a transaction. A new subject takes the place of the oldest that the device has not spoken of since: so
        what it said of that is refused if it comes once more."""
        query = "SELECT subject, round, threshold, noise FROM updates WHERE device = ?"
        known = {subject: said for subject, *said in self._db.execute(query, (device,))}
        u, said = update, known.get(update.subject)
        if said == [u.round, u.threshold, u.noise]:
            return "duplicate"
        self.released(device, u.noise)
        if said is not None and said[0] >= u.round:
            return "duplicate" if said[0] == u.round else "superseded"
        if said is None and len(known) >= _DEVICE_SUBJECTS:
            oldest = min(known, key=lambda subject: known[subject][0])
            if known[oldest][0] >= u.round:
                return "subjects"
            self._db.execute("DELETE FROM updates WHERE device = ? AND subject = ?", (device, oldest))
        elif said is None:
            if self._rows >= _ROWS:
                return "crowded"
            self._rows += 1
        values = (device, u.subject, u.round, u.base, u.threshold, u.evidence, *(u.statistics or (None,) * 3), u.noise)
        self._db.execute(_ACCEPT, values)
        return None

    def counted_in(self, round: int) -> int:
        """Devices whose updates were aggregated in `round`."""
        return self._value("SELECT count(DISTINCT device) FROM updates WHERE counted = ?", round)

    def answered(self) -> int:
        """Devices whose update of the present round is here."""
        return self._value(
            "SELECT count(DISTINCT device) FROM updates WHERE counted = 0 AND round = ?", self.state.round
        )

    def lately(self) -> int:
        """Devices that took part in one of the last rounds."""
        last = self.state.round - LATELY - self.state.collecting
        return self._value("SELECT count(DISTINCT device) FROM updates WHERE counted > ?", max(0, last))

    def pending(self) -> dict[str, Pending]:
        """By subject."""
        most = "SELECT subject FROM updates WHERE counted = 0 GROUP BY subject ORDER BY count(*) DESC, subject LIMIT ?"
        columns = "subject, device, round, threshold, evidence, mean_u, mean_beta, slope, before"
        waiting = f"SELECT {columns} FROM updates WHERE counted = 0 AND subject IN ({most})"
        rows: dict[str, list[tuple[Any, ...]]] = {}
        for subject, *row in self._db.execute(waiting, (_SUBJECTS,)):
            rows.setdefault(subject, []).append(tuple(row))
        found: dict[str, Pending] = {}
        for subject, of in rows.items():
            table = np.array([row[1:] for row in of], np.float64)  # None becomes NaN
            names = [row[0] for row in of]
            found[subject] = Pending(names, table[:, 0], table[:, 1], table[:, 2], table[:, 3:6], table[:, 6])
        return found

    def counted(self, subject: str, round: int) -> None:
        """In a transaction: all updates of the subject are in the aggregate of `round`."""
        self._db.execute("UPDATE updates SET counted = ? WHERE counted = 0 AND subject = ?", (round, subject))

    def forget(self, state: State) -> None:
        """In a transaction: updates of long ago."""
        state.floor = max(state.floor, state.round - REMEMBERED)
        self._db.execute("DELETE FROM updates WHERE round <= ?", (state.floor,))
        self._count()

    # What is agreed

    def content(self, number: int | None = None) -> dict[str, Kept]:
        """Under `number` in the history; None: the present one. Empty if it is not there."""
        raw = self._content(number)
        return msgspec.json.decode(raw, type=dict[str, Kept]) if raw else {}

    def remember(self, entry: Entry, content: Mapping[str, Kept], most: int) -> None:
        """In a transaction: a new number, of which the history keeps `most`."""
        self._remember(entry, msgspec.json.encode(dict(content)), most)

    def overall(self) -> Overall | None:
        row = self._db.execute("SELECT message FROM overall").fetchone()
        return decode_overall(row[0]) if row else None

    def keep_overall(self, number: int, message: bytes) -> None:
        """In a transaction."""
        self._db.execute("INSERT OR REPLACE INTO overall VALUES (1, ?, ?)", (number, message))
