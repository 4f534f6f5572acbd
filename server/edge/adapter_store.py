"""What an edge's rounds of adapters keep on disk: a number store, the devices' offers, and files by their SHA-256.

    incoming/<id>.gguf      uploaded; <id>.gguf.partial while it grows
    blobs/<id>.gguf         agreed, as far back as the history goes

An offer is committed before it is acknowledged, a file is on the disk before its upload is answered.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from models.partial import partial_path
from protocol.adapters import AdapterOffer
from protocol.errors import StoreError
from server.edge.adapter_combine import Kept
from server.edge.number_store import LATELY, Entry, NumberStore

if TYPE_CHECKING:
    from sqlite_utils.migrations import Migrations

MOST_DEVICES = 16_384
TRAFFIC_ROUNDS = 1000  # whose bytes are kept
FOLDER = "adapters"  # in the edge's

_OFFER = "device, round, id, bytes, model, rank, lessons, share, noise, arrived"


class Offered(NamedTuple):
    """A row of `offers`."""

    device: str
    round: int
    id: str
    bytes: int
    model: str
    rank: int
    lessons: int
    share: str
    noise: float
    arrived: int


def decode_content(raw: bytes | None) -> list[Kept]:
    return msgspec.json.decode(raw, type=list[Kept]) if raw else []


class AdapterStore(NumberStore):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._incoming, self._blobs = folder / "incoming", folder / "blobs"
        try:
            for each in (self._incoming, self._blobs):
                each.mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise StoreError(f"the edge's folder {folder} cannot be written: {error.strerror}") from None

    @staticmethod
    def _migrations() -> Migrations:
        from server.edge.adapter_schema import MIGRATIONS

        return MIGRATIONS

    # Offers and uploads

    def offer(self, device: str, offer: AdapterOffer, most: int) -> str | None:
        """Keeps it; or the name of the reason not to (`adapter_rounds.REASONS`). `most`: bytes of all offers of a round
        together. The same once more changes nothing, and gives nothing more away; what is refused does."""
        with self._commit():
            known = self.offered(offer.id, offer.round)
            if known is not None and known.device == device:
                return None
            last = self._last(device)
            again = last is not None and last.id == offer.id
            if not again:
                self.released(device, offer.noise)
            if known or (not again and self.blob(offer.id).exists()):
                return "copied"
            here = bool(last and again and last.arrived and self.incoming(offer.id).exists())
            return self._kept(device, offer, last, most, here)

    def _kept(self, device: str, offer: AdapterOffer, last: Offered | None, most: int, here: bool) -> str | None:
        """`here`: its file came in an earlier round."""
        if last is not None and last.round >= offer.round:
            return "duplicate"
        if last is None and self._value("SELECT count(*) FROM offers") >= MOST_DEVICES:
            return "crowded"
        if self._value("SELECT coalesce(sum(bytes), 0) FROM offers WHERE round = ?", offer.round) + offer.bytes > most:
            return "no_room"
        row = (device, offer.round, offer.id, offer.bytes, offer.model, offer.rank, offer.lessons, offer.share)
        counted = self._value("SELECT coalesce(max(counted), 0) FROM offers WHERE device = ?", device)
        insert = f"INSERT OR REPLACE INTO offers ({_OFFER}, counted) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._db.execute(insert, (*row, offer.noise, here, counted))
        return None

    def _last(self, device: str) -> Offered | None:
        row = self._db.execute(f"SELECT {_OFFER} FROM offers WHERE device = ?", (device,)).fetchone()
        return Offered(*row) if row else None

    def offered(self, id: str, round: int) -> Offered | None:
        row = self._db.execute(f"SELECT {_OFFER} FROM offers WHERE id = ? AND round = ?", (id, round)).fetchone()
        return Offered(*row) if row else None

    def arrived(self, id: str, round: int) -> None:
        """Its file is in `incoming`."""
        with self._commit():
            self._db.execute("UPDATE offers SET arrived = 1 WHERE id = ? AND round = ?", (id, round))

    def dropped(self, device: str, round: int) -> None:
        """What it uploaded is of no use: it counts as not offered, and cannot be offered again in this round."""
        with self._commit():
            self._db.execute("UPDATE offers SET id = '' WHERE device = ? AND round = ?", (device, round))

    def uploads(self, round: int) -> list[Offered]:
        """Of which the files are here, by device."""
        rows = self._db.execute(
            f"SELECT {_OFFER} FROM offers WHERE round = ? AND arrived = 1 AND id != '' ORDER BY device", (round,)
        )
        return [Offered(*row) for row in rows]

    def pending(self, round: int) -> int:
        """Offers whose files are still to come."""
        return self._value("SELECT count(*) FROM offers WHERE round = ? AND arrived = 0 AND id != ''", round)

    def lately(self) -> int:
        """Devices that counted in one of the last rounds."""
        last = self.state.round - LATELY - self.state.collecting
        return self._value("SELECT count(*) FROM offers WHERE counted > ?", max(0, last))

    def counted(self, devices: Iterable[str], round: int) -> None:
        """In a transaction."""
        self._db.executemany("UPDATE offers SET counted = ? WHERE device = ?", [(round, each) for each in devices])

    def ended(self, round: int, trouble: str) -> None:
        """In a transaction. `trouble`: what has no result, and why; empty: all is well."""
        self._db.execute("DELETE FROM ended")
        self._db.execute("INSERT INTO ended VALUES (?, ?)", (round, trouble))

    def traffic(self, round: int, up: int, down: int) -> None:
        """Adds bytes to those of the round."""
        with self._commit():
            self._db.execute(
                "INSERT INTO traffic VALUES (?, ?, ?) "
                "ON CONFLICT (round) DO UPDATE SET up = up + excluded.up, down = down + excluded.down",
                (round, up, down),
            )
            self._db.execute("DELETE FROM traffic WHERE round <= ?", (round - TRAFFIC_ROUNDS,))

    # What was agreed

    def content(self, number: int | None = None) -> list[Kept]:
        """Under `number` in the history; None: the present one. Empty if it is not there."""
        return decode_content(self._content(number))

    def remember(self, entry: Entry, content: Sequence[Kept], most: int) -> None:
        """In a transaction: a new number, of which the history keeps `most`."""
        self._remember(entry, msgspec.json.encode(list(content)), most)

    # Files

    def incoming(self, id: str) -> Path:
        return self._incoming / f"{id}.gguf"

    def blob(self, id: str) -> Path:
        return self._blobs / f"{id}.gguf"

    def sweep(self, most: int) -> None:
        """Removes the history's oldest entries while its files take more than `most` bytes, and files that are in no
        entry. The present entry stays. Of uploads each device's last one stays, up to `most` bytes together: it need
        not come again in the next round if the device has learned nothing since."""
        names: set[str] = set()
        room = most
        for id, size, round in self._db.execute("SELECT id, bytes, round FROM offers ORDER BY round DESC, device"):
            room -= size
            if id and (room >= 0 or round == self.state.round):
                names.add(self.incoming(id).name)
                if round == self.state.round and self.state.collecting:
                    names.add(partial_path(self.incoming(id)).name)
        _remove(self._incoming, names)
        kept: set[str] = set()
        for place, entry in enumerate(self.history()):
            more = kept | {blob.id for of in self.content(entry.number) for blob in of.group.blobs.values()}
            if place and sum(_size(self.blob(id)) for id in more) > most:
                with self._commit():
                    self._db.execute("DELETE FROM history WHERE number <= ?", (entry.number,))
                break
            kept = more
        _remove(self._blobs, {self.blob(id).name for id in kept})

    @contextmanager
    def _commit(self) -> Iterator[sqlite3.Connection]:
        """Survives the end of the process; a power cut from the next transaction on."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
                self._count()


def _remove(folder: Path, but: set[str]) -> None:
    for each in os.scandir(folder):
        if each.name not in but:
            with contextlib.suppress(OSError):
                os.unlink(each.path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
