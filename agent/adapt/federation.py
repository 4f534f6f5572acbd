"""The device's part in the rounds of adapters of its cluster (protocol/adapters.py has the messages).

    AdapterCall  ──►  wait a random part of `spread`  ──►  AdapterOffer  ──►  upload  ──►  answered
    AdapterAgreed  ──►  the nearest group's adapter of this device's rank  ──►  fetched, verified  ──►  considered

A call is answered once, with what this device has learned last that others may have. What was made ready for a round
is kept, so that a device which was killed or cut off sends the same, and goes on where the upload broke off. Without
broker or edge it tries again, ever more rarely, until the round is over.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from agent.adapt.blobs import NotOffered, Refused, fetch, upload
from agent.adapt.noise import secret_gauss, with_a
from agent.adapt.outgoing import Memory, Outgoing, Own, Past, ShareOptions, hash_of
from agent.adapt.store import FLEET, OWN
from models import adapter as adapters
from models.adapter import Adapter, Floats
from protocol.adapters import (
    AdapterAgreed,
    AdapterCall,
    AdapterOffer,
    Blob,
    centre_of,
    decode_agreed,
    decode_call,
    encode,
    fitting,
    nearest,
)
from protocol.errors import BadAdapter, LinkError, PullError, SkerryError, StoreError, TrainingError
from protocol.reading import read
from protocol.topics import ADAPTER_AGREED, ADAPTER_CALL, ADAPTER_OFFER, EDGE, Cluster
from protocol.transport.base import Delivery, Transport

log = logging.getLogger(__name__)

EVENTS = (
    "called",
    "offered",
    "uploaded",
    "refused",
    "retried",
    "skipped",
    "agreed",
    "fetched",
    "not_fetched",
    "nothing_learned",
    "kept_here",
    "privacy_spent",
    "out_of_date",
    "malformed",
    "version",
)
_ACKNOWLEDGED_SECONDS = 5.0  # how long the broker's acknowledgement of an offer is waited for
_AGREED = "agreed"
_KEPT = 3  # agreed adapters on disk: the gate looks at them later


class AdapterFederation:
    """Subscribes at `transport`, which must not be started yet. `own`: the device's own adapter at this time.
    `consider`: takes an adapter for a slot, judges it when it likes, and returns at once. `folder`: its own. `draw`:
    uniform on [0, 1). `judged`: whether the adapter of this id was judged before. `counts`: by EVENTS. `bytes_up`,
    `bytes_down`: of files. Raises StoreError."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        transport: Transport,
        folder: Path,
        model: str,
        own: Callable[[], Own | None],
        consider: Callable[[Path, str], None],
        options: ShareOptions,
        clock: Callable[[], float],
        draw: Callable[[], float],
        gauss: Callable[[int], Floats] = secret_gauss,
        judged: Callable[[str], bool] = lambda id: False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.bytes_up = 0
        self.bytes_down = 0
        self._topic = cluster.path(ADAPTER_OFFER, me)
        self._transport = transport
        self._folder = folder
        self._model = model
        self._own = own
        self._consider = consider
        self._options = options
        self._clock = clock
        self._draw = draw
        self._judged = judged
        self._changed = threading.Condition()  # of what follows
        try:
            (folder / _AGREED).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be made: {error.strerror}") from None
        self._memory = Memory(folder, cluster)
        self._outgoing = Outgoing(folder, model, own, self._fleet, options, self._memory, gauss, self.counts)
        self._call: tuple[AdapterCall, float, float] | None = None  # to be answered, from when until when
        self._behind = 0  # a round below one that was answered: the edge that called it is told once
        self._silent = 0  # a round that this device had nothing to say in
        self._highest = 0  # heard since the start
        self._news: AdapterAgreed | None = None  # to be heeded
        self._heed_at = -math.inf
        self._pause = options.first_retry  # until the next attempt to heed
        self._acknowledged = ""  # hash of the last offer that the broker has
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
        transport.subscribe(cluster.path(ADAPTER_CALL, EDGE), self._called, qos=ADAPTER_CALL.qos)
        transport.subscribe(cluster.path(ADAPTER_AGREED, EDGE), self._agreed, qos=ADAPTER_AGREED.qos)

    @property
    def past(self) -> Past:
        return self._memory.past

    @property
    def spent(self) -> float:
        """Epsilon, so far; infinite if adapters are sent without noise."""
        return self._outgoing.spent()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # What is heard, on the transport's thread

    def _called(self, delivery: Delivery) -> None:
        call = read(decode_call, delivery.payload, self.counts)
        if call is None:
            return
        with self._changed:
            if call.round in (self.past.answered, self._behind, self._silent) or (
                self._call and call.round <= self._call[0].round
            ):
                return
            self._behind = min(call.round, self.past.answered)
            self.counts["called"] += 1
            now = self._clock()
            self._call = (call, now + self._draw() * call.spread, now + call.seconds)
            self._changed.notify_all()

    def _agreed(self, delivery: Delivery) -> None:
        agreed = read(decode_agreed, delivery.payload, self.counts)
        if agreed is None:
            return
        with self._changed:
            if agreed.number < max(self._highest, self.past.number):
                self.counts["out_of_date"] += 1
                return
            self.counts["agreed"] += 1
            self._highest, self._news = agreed.number, agreed
            self._heed_at, self._pause = -math.inf, self._options.first_retry
            self._changed.notify_all()

    # What is done about it, on a thread of its own

    def _run(self) -> None:
        while not self._closed:
            with self._changed:
                self._changed.wait_for(self._is_something_due, self._until_due())
                due = self._call if self._is_called() else None
                news = self._news if self._clock() >= self._heed_at else None
            try:
                if news is not None:
                    self._heed(news)
                if due is not None and not self._closed:
                    self._answer(due[0], due[2])
            except Exception as error:  # what is wrong with one round must not end the next ones
                log.error("a round of adapters was not taken part in: %s", type(error).__name__)
            finally:
                with self._changed:
                    self._call = None if self._call is due else self._call

    def _is_something_due(self) -> bool:
        return self._closed or self._is_called() or (self._news is not None and self._clock() >= self._heed_at)

    def _is_called(self) -> bool:
        return self._call is not None and self._clock() >= self._call[1]

    def _until_due(self) -> float | None:
        times = [self._call[1]] if self._call else []
        times += [self._heed_at] if self._news else []
        return max(0.0, min(times) - self._clock()) if times else None

    # Up

    def _answer(self, call: AdapterCall, until: float) -> None:
        try:
            offer = self._outgoing.offer(call)
        except SkerryError as error:
            self.counts["nothing_learned"] += 1
            log.warning("there is no adapter for round %d: %s", call.round, error)
            offer = None
        if offer is None:
            self._silent = call.round
            return
        if offer.round > call.round:  # which the edge will not take, but learn from
            self._publish(offer)
            return
        pause = self._options.first_retry
        while not self._superseded(call) and self._clock() < until:
            try:
                self._publish(offer)
                self._upload(call, offer)
            except Refused as error:
                self.counts["refused"] += 1
                log.warning("the edge refuses the adapter for round %d: %s", call.round, error)
                self._memory.change(answered=call.round)
                return
            except LinkError as error:
                if isinstance(error, NotOffered):
                    self._acknowledged = ""
                self.counts["retried"] += 1
            else:
                self.counts["uploaded"] += 1
                self._memory.change(answered=call.round)
                return
            with self._changed:
                self._changed.wait_for(lambda: self._superseded(call), min(pause, max(0.0, until - self._clock())))
            pause = min(self._options.longest_retry, pause * (1.5 + self._draw()))
        self.counts["skipped"] += 1

    def _superseded(self, call: AdapterCall) -> bool:
        return self._closed or (self._call is not None and self._call[0].round > call.round)

    def _publish(self, offer: AdapterOffer) -> None:
        """Until the broker has it. Raises LinkError."""
        key = f"{offer.round} {offer.id}"
        if self._acknowledged == key:
            return

        def acknowledged() -> None:
            with self._changed:
                self._acknowledged = key
                self._changed.notify_all()

        if not self._transport.publish(self._topic, encode(offer), qos=ADAPTER_OFFER.qos, done=acknowledged):
            raise LinkError("the broker is not connected")
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._acknowledged == key, _ACKNOWLEDGED_SECONDS)
            if self._acknowledged != key:
                raise LinkError("the broker does not acknowledge the offer")
        self.counts["offered"] += 1

    def _upload(self, call: AdapterCall, offer: AdapterOffer) -> None:
        def sent(count: int) -> None:
            self.bytes_up += count

        upload(call.url, offer.id, self._outgoing.path, sent, lambda: self._superseded(call))

    # Down

    def _heed(self, agreed: AdapterAgreed) -> None:
        try:
            self._take(agreed)
        except (PullError, BadAdapter, TrainingError, StoreError, OSError) as error:
            self.counts["not_fetched"] += 1
            log.warning("what was agreed as number %d is not here: %s", agreed.number, error)
            with self._changed:
                self._heed_at = self._clock() + self._pause
                self._pause = min(self._options.longest_retry, self._pause * (1.5 + self._draw()))
            return
        with self._changed:
            self._news = None if self._news is agreed else self._news

    def _take(self, agreed: AdapterAgreed) -> None:
        """Raises PullError, BadAdapter, TrainingError, StoreError."""
        own = self._own()
        mine = adapters.read(own.path) if own else None
        groups = [group for group in agreed.groups if group.model == self._model]
        group = nearest(centre_of(mine.centroid) if mine else b"", groups)
        if group is None or (group.share == "a" and mine is None):
            self._memory.change(number=agreed.number)
            return
        blob = fitting(group, mine.rank if mine else max(group.blobs))
        composed = self._folder / _AGREED / f"own.{blob.id[:16]}.gguf"
        judged, told = hash_of(composed), agreed.number == self.past.number
        if group.share == "all":
            judged, told = blob.id, told or blob.id == self.past.fleet
        if told and self._judged(judged):  # nothing new; whoever rolled it back meanwhile shall not get it again
            self._memory.change(number=agreed.number)
            return
        path = self._fetched(agreed.url, blob)
        if group.share == "a" and mine is not None:
            adapters.write(with_a(mine, adapters.read(path)), composed)
            self._consider(composed, OWN)
        else:
            self._consider(path, FLEET)
        self._memory.change(number=agreed.number, fleet=blob.id)
        self._tidy()

    def _fetched(self, url: str, blob: Blob) -> Path:
        def came(count: int) -> None:
            self.bytes_down += count

        folder = self._folder / _AGREED
        if (path := folder / f"{blob.id}.gguf").exists() and hash_of(path) != blob.id:
            path.unlink()  # damaged on this disk
        path = fetch(url, blob, folder, came)
        self.counts["fetched"] += 1
        return path

    def _fleet(self) -> Adapter | None:
        path = self._folder / _AGREED / f"{self.past.fleet}.gguf"
        return adapters.read(path) if self.past.fleet and path.exists() else None

    def _tidy(self) -> None:
        all_ = sorted((self._folder / _AGREED).iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
        for path in all_[2 * _KEPT :]:
            if not path.name.startswith(self.past.fleet):
                path.unlink(missing_ok=True)
