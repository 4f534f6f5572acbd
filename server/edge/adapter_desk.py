"""Where devices hand their adapters in: which offers an edge takes, and which of the files that come over HTTP.

The name of the reason for each offer that is refused is one of REASONS.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from models.adapter import MOST_BYTES, read
from protocol.adapters import AdapterOffer, decode_offer
from protocol.errors import BadAdapter, ProtocolError
from protocol.limits import Buckets
from protocol.topics import Cluster
from protocol.transport.base import Delivery
from server.edge.adapter_store import AdapterStore, Offered
from server.edge.admission import NOISE

log = logging.getLogger(__name__)

RATE, BURST = 0.2, 16  # offers of one device, per second and at once
_MOST_REFUSED = 1024  # hashes of which it is known why they were refused
_MOST_REFUSALS = 10_000
_OVER = "the round is over: offer it again in the next one"

REASONS = {
    "malformed": "not a message of the protocol",
    "version": "of a newer version",
    "retained": "kept by the broker: an offer is for one round",
    "flood": f"more than one in {1 / RATE:g} seconds, {BURST} at once",
    "noise": f"clip is not a number of at least 0, or noise neither 0 nor {NOISE[0]:g} to {NOISE[1]:g}",
    "future": "of a round that was not called yet",
    "late": "of a round that is over",
    "share": "not what the strategy of the round takes",
    "too_large": "more bytes than one adapter may have",
    "no_room": "more bytes than all adapters of a round may have together",
    "copied": "another device's, or one that was agreed",
    "duplicate": "a second adapter in the same round",
    "crowded": "more devices than an edge keeps",
    "broken": "the file is damaged, or not what was offered",
    "screened": "unlike the others in shape, size or direction",
}


class AdapterDesk:
    """`blobs.Desk`. `open`: a round collects. `agreed`: hashes of what may be fetched. `refusals`: by device and
    reason, since they were last counted. All of it, and the store, under `lock`. `whole`: not A matrices alone.
    `most_bytes`: of one adapter; `disk_bytes`: of all offers of a round."""

    def __init__(
        self,
        cluster: Cluster,
        store: AdapterStore,
        whole: bool,
        most_bytes: int,
        disk_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self.open = bool(store.state.collecting)
        self.agreed: set[str] = set()
        self.refusals: Counter[tuple[str, str]] = Counter()
        self.most_bytes = min(most_bytes, MOST_BYTES)
        self._cluster = cluster
        self._store = store
        self._whole = whole
        self._disk_bytes = disk_bytes
        self._senders = Buckets(RATE, BURST, clock, most=16_384)
        self._refused: dict[str, str] = {}  # by hash, of this round

    def begin(self) -> None:
        """A new round."""
        self.open = True
        self._refused.clear()

    # Offers, on the transport's thread

    def offered(self, delivery: Delivery) -> None:
        device = self._cluster.sender(delivery.topic)
        if device is None:
            self.counts["malformed"] += 1
            return
        with self.lock:
            try:
                reason = self._judged(device, delivery)
            except sqlite3.Error as error:
                self.counts["disk"] += 1
                log.error("an offer could not be kept: %s", error)
                return
            if reason is not None:
                self.refuse(device, reason)

    def _judged(self, device: str, delivery: Delivery) -> str | None:
        """Keeps the offer, or says why not."""
        if delivery.retained:
            return "retained"
        if not self._senders.take(device):
            return "flood"
        try:
            offer = decode_offer(delivery.payload)
        except ProtocolError:
            return "malformed"
        if offer is None:
            return "version"
        state = self._store.state
        if offer.base > max(state.number, state.heard_number) or offer.round > max(state.round, state.heard_round):
            self._store.lift(device, offer.base, offer.round)
        if not (0.0 <= offer.clip < math.inf and (offer.noise == 0.0 or NOISE[0] <= offer.noise <= NOISE[1])):
            return "noise"
        reason = self._unfit(offer)
        if reason is None:
            reason = self._store.offer(device, offer, self._disk_bytes)
        else:
            self._store.released(device, offer.noise)
        if reason is not None:
            self._note(offer.id, reason)
        return reason

    def _unfit(self, offer: AdapterOffer) -> str | None:
        """The reason that lies in the offer itself."""
        round = self._store.state.round
        if offer.round > round:
            return "future"
        if offer.round < round or not self.open:
            return "late"
        if offer.bytes > self.most_bytes:
            return "too_large"
        return "share" if (offer.share == "all") != self._whole else None

    def _note(self, id: str, reason: str) -> None:
        if reason != "copied" and len(self._refused) < _MOST_REFUSED:
            self._refused[id] = reason

    def refuse(self, device: str, reason: str) -> None:
        if len(self.refusals) < _MOST_REFUSALS:
            self.refusals[device, reason] += 1

    # Files: blobs.Desk, on the threads of the server

    def expects(self, id: str) -> Offered | str:
        with self.lock:
            state = self._store.state
            offered = self._store.offered(id, state.round) if self.open else None
            if offered is not None:
                return offered
            if reason := self._refused.get(id):
                return f"the offer was refused ({reason}): {REASONS[reason]}"
        raise LookupError(id)

    def is_here(self, id: str) -> bool:
        with self.lock:
            offered = self._store.offered(id, self._store.state.round)
            return bool(offered and offered.arrived)

    def incoming(self, id: str) -> Path:
        return self._store.incoming(id)

    def took(self, id: str) -> None:
        path = self._store.incoming(id)
        with self.lock:
            offered = self._store.offered(id, self._store.state.round)
        if offered is None:
            raise BadAdapter(_OVER)
        try:
            _check(path, offered)
        except BadAdapter:
            with self.lock:
                self._store.dropped(offered.device, offered.round)
                self.refuse(offered.device, "broken")
                self._note(id, "broken")
            path.unlink(missing_ok=True)
            raise
        with self.lock:
            if not self.open or offered.round != self._store.state.round:
                raise BadAdapter(_OVER)
            self._store.arrived(id, offered.round)

    def blob(self, id: str) -> Path | None:
        with self.lock:
            return self._store.blob(id) if id in self.agreed else None


def _check(path: Path, offered: Offered) -> None:
    """Raises BadAdapter: the file is damaged, or not what was offered."""
    adapter = read(path)
    if adapter.model != offered.model:
        raise BadAdapter(f"the adapter is for another model ({adapter.model[:12]}) than was offered")
    if adapter.rank != offered.rank:
        raise BadAdapter(f"the adapter has rank {adapter.rank}, {offered.rank} was offered")
    if offered.share == "a" and any(factors.b.any() for factors in adapter.factors.values()):
        raise BadAdapter("the adapter has B matrices, which were to stay on the device")
