"""The rounds of adapters of one cluster (protocol/adapters.py has the messages, blobs.py the files' way).

    idle ──next, or an order──► AdapterCall ──► offers, uploads ──all here, or deadline──► aggregate ──► AdapterAgreed

As in rounds.py: a thread of its own drives them, every step is one transaction, published when that is on the disk and
again after each reconnection. What was offered and uploaded (adapter_desk.py) before the edge was killed counts after
it. Aggregating takes its time, in a process of its own (adapter_combine.py), and nothing is locked meanwhile. If it
fails, the round ends without a result, and what was agreed before goes on being served.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.adapters import (
    AdapterAgreed,
    AdapterCall,
    AdapterGroup,
    Strategy,
    decode_agreed,
    decode_call,
    encode,
)
from protocol.reading import read
from protocol.rounds import MAX_NUMBER
from protocol.topics import ADAPTER_AGREED, ADAPTER_CALL, ADAPTER_OFFER, EDGE, Cluster, Topic
from protocol.transport.base import Delivery, Transport
from server.edge.adapter_combine import CombineFailed, Combiner, Job, Kept, Result, Upload
from server.edge.adapter_desk import AdapterDesk
from server.edge.adapter_store import AdapterStore
from server.edge.blobs import PATH, BlobLimits, BlobServer
from server.edge.number_store import Entry, Order, State

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_RETRY_SECONDS = 5.0
_SAVE_SECONDS = (30.0, 1.0)  # between two times that the clock is written down: idle, collecting
_REPAIR_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """Seconds: `every`, `collect`, `spread`, `settle` as in RoundOptions. A round ends early once `devices` have
    uploaded, and all that counted in one of the last three, whose time to offer is `spread`. `url`: where devices reach
    the blobs; empty: where they are served. `ranks`: for which adapters are made, besides those of the devices.
    `most_bytes`: of one adapter; `disk_bytes`: of a round's uploads, and of all that was agreed; `memory`: of
    aggregating. `group`: by similarity of what was learned. `least`: devices that a result rests on."""

    every: float = 86_400.0
    collect: float = 1800.0
    spread: float = 60.0
    devices: int = 0
    least: int = 1
    strategy: Strategy = "flexlora"
    group: bool = True
    ranks: tuple[int, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    url: str = ""
    most_bytes: int = 64 * 10**6
    disk_bytes: int = 2 * 10**9
    memory: int = 2 * 10**9
    history: int = 10
    settle: float = 1.0


class AdapterRounds:
    """Subscribes at `home`, which must not be started yet; whose `on_up` and `on_down` have to call `up` and `down`.
    `clock`: monotonic."""

    def __init__(
        self,
        cluster: Cluster,
        home: Transport,
        store: AdapterStore,
        combine: Combiner,
        options: AdapterOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
        limits: BlobLimits | None = None,
    ) -> None:
        self._cluster = cluster
        self._home = home
        self._store = store
        self._combine = combine
        self._options = options = options or AdapterOptions()
        self._clock = clock
        whole = options.strategy != "fedsa"
        self._desk = AdapterDesk(cluster, store, whole, options.most_bytes, options.disk_bytes, clock)
        self._lock = self._desk.lock  # of the store and of what follows
        self._found: AdapterAgreed | None = None  # at the broker, while the history is empty
        self._due = {ADAPTER_CALL, ADAPTER_AGREED}
        self._wanted = 0
        self._seconds = store.state.seconds
        self._looked = clock()
        self._up_at = math.inf
        self._repaired = -math.inf
        self._told = (0, 0)  # bytes that are in the store's traffic
        self._closing = threading.Event()
        self.blobs = BlobServer(self._desk, options.host, options.port, limits)
        self._thread = threading.Thread(target=self._run, name="adapter rounds", daemon=True)
        home.subscribe(cluster.path(ADAPTER_CALL, EDGE), self._own_call, qos=ADAPTER_CALL.qos)
        home.subscribe(cluster.path(ADAPTER_AGREED, EDGE), self._own_agreed, qos=ADAPTER_AGREED.qos)
        home.subscribe(cluster.path(ADAPTER_OFFER), self._desk.offered, qos=ADAPTER_OFFER.qos)

    @property
    def url(self) -> str:
        options = self._options
        host = f"[{options.host}]" if ":" in options.host else options.host
        return (options.url or f"http://{host}:{self.blobs.port}{PATH}").rstrip("/")

    def start(self) -> None:
        """Raises ConfigError if it cannot listen for the devices."""
        with self._lock:
            self._settle()
            self._wanted = self._store.lately()
        self.blobs.start()
        self._thread.start()

    def close(self) -> None:
        """What is retained at the broker stays."""
        self._closing.set()
        if stop := getattr(self._combine, "stop", None):
            stop()
        if self._thread.is_alive():
            self._thread.join()
        self.blobs.close()
        with self._lock:
            try:
                self._count()
                self._save()
            except sqlite3.Error as error:
                log.error("what was last counted could not be kept: %s", error)
            self._store.close()

    def up(self) -> None:
        with self._lock:
            self._up_at = self._clock()
            self._due = {ADAPTER_CALL, ADAPTER_AGREED}

    def down(self) -> None:
        with self._lock:
            self._up_at = math.inf

    # What the broker had kept

    def _own_call(self, delivery: Delivery) -> None:
        call = read(decode_call, delivery.payload, self._desk.counts) if delivery.payload else None
        with self._lock:
            if call is not None and call.round > max(self._store.state.round, self._store.state.heard_round):
                self._store.hear(0, call.round)

    def _own_agreed(self, delivery: Delivery) -> None:
        told = read(decode_agreed, delivery.payload, self._desk.counts) if delivery.payload else None
        with self._lock:
            if told is not None and told.number > max(self._store.state.number, self._store.state.heard_number):
                self._store.hear(told.number, told.round)
                self._found = told

    # What is done about it, on the thread of the rounds

    def _run(self) -> None:
        pause = _TICK_SECONDS
        while not self._closing.wait(pause):
            try:
                with self._lock:
                    job = self._tick()
                if job is not None:
                    self._conclude(job)
                pause = _TICK_SECONDS
            except Exception as error:  # a disk that is full, say: a later tick may do better
                log.error("the rounds of adapters cannot go on: %s: %s", type(error).__name__, error)
                pause = _RETRY_SECONDS

    def _tick(self) -> Job | None:
        """What is to be aggregated now, if the round is over."""
        now = self._clock()
        settled = self._home.connected and now - self._up_at >= self._options.settle
        if settled:
            self._seconds += max(0.0, now - self._looked)
        self._looked = now
        self._count()
        if not settled:
            return None
        for order in self._store.orders():
            self._obey(order)
        state = self._store.state
        if state.heard_number > state.number and now - self._repaired >= _REPAIR_SECONDS:
            self._repaired = now
            self._renumber()
        if state.collecting and self._over():
            self._desk.open = False
            return self._job()
        if not state.collecting and not state.held and (self._seconds >= state.next or state.heard_round > state.round):
            self._begin()
        elif self._seconds - state.seconds >= _SAVE_SECONDS[state.collecting]:
            self._save()
        self._publish()
        return None

    def _begin(self) -> None:
        options = self._options
        with self._store.transaction() as state:
            state.round = max(state.round, state.heard_round) + 1
            state.collecting, state.seconds = 1, self._seconds
            state.began, state.ends = self._seconds, self._seconds + options.collect
            state.next = self._seconds + options.every
        self._wanted = self._store.lately()
        self._desk.begin()
        self._settle()
        self._due.add(ADAPTER_CALL)
        log.info("round %d of adapters begins", state.round)

    def _over(self) -> bool:
        state, options = self._store.state, self._options
        if self._seconds >= state.ends:
            return True
        if not options.devices and not self._wanted:
            return False
        asked = self._seconds >= state.began + options.spread or not self._wanted
        here = len(self._store.uploads(state.round))
        return asked and here >= max(options.devices, self._wanted) and not self._store.pending(state.round)

    def _job(self) -> Job:
        store, options = self._store, self._options
        uploads = [
            Upload(each.device, str(store.incoming(each.id)), each.model, each.rank, each.lessons)
            for each in store.uploads(store.state.round)
            if store.incoming(each.id).exists()
        ]
        before = [kept.members for kept in store.content()]
        folder = str(store.blob("").parent)
        return Job(uploads, options.strategy, list(options.ranks), before, folder, options.memory, options.group)

    def _conclude(self, job: Job) -> None:
        """Without the lock while it is aggregated."""
        came, least = len(job.uploads), self._options.least
        result = Result([], {}, [] if came >= least else [f"{came} adapters came, {least} are needed"])
        if came >= least:
            try:
                result = self._combine(job)
            except CombineFailed as error:
                if self._closing.is_set():
                    return  # the round is still there when the edge is back
                result.failed.append(str(error))
        with self._lock:
            for device, reason in result.refused.items():
                self._desk.refuse(device, "screened")
                log.info("the adapter of %s is left out: %s", device, reason)
            made = [kept for kept in result.made if kept.group.devices >= least]
            failed = result.failed or ([] if made else [f"none of {came} adapters is in a result: see who was refused"])
            self._agree(made, "; ".join(failed))

    def _agree(self, made: list[Kept], trouble: str) -> None:
        if trouble:
            log.warning("not all that came in this round is agreed: %s", trouble)
        with self._store.transaction() as state:
            self._store.ended(state.round, trouble)
            members = [device for kept in made for device in kept.members]
            if made:
                state.number = _next_number(state)
                entry = Entry(state.number, state.round, "round", state.number, len(members))
                self._store.remember(entry, made, self._options.history)
                self._store.counted(members, state.round)
                self._due.add(ADAPTER_AGREED)
            state.collecting, state.seconds = 0, self._seconds
        self._settle()
        log.info("round %d of adapters ends: %d devices, number %d", state.round, len(members), state.number)

    def _obey(self, order: Order) -> None:
        with self._store.transaction() as state:
            self._store.done(order)
            if order.kind == "round" and not state.collecting:
                state.next = self._seconds
            elif order.kind == "hold":
                state.held, state.collecting = 1, 0
                self._desk.open = False
            elif order.kind == "resume":
                state.held = 0
            elif order.kind == "rollback":
                self._roll_back(state, order.number)
        self._settle()
        log.info("order: %s", order.kind)

    def _roll_back(self, state: State, number: int | None) -> None:
        """In a transaction."""
        past = next((entry for entry in self._store.history() if entry.number == number), None)
        if past is None:
            log.warning("number %s is no longer in the history: nothing is rolled back", number)
            return
        state.number = _next_number(state)
        entry = Entry(state.number, state.round, "rollback", past.of, past.devices)
        self._store.remember(entry, self._store.content(past.number), self._options.history)
        self._due.add(ADAPTER_AGREED)

    def _renumber(self) -> None:
        """Somebody knows a higher number than ours: we lost it. What the broker kept is taken up if its files are still
        here; else nothing is said until the next round."""
        found, self._found = self._found, None
        known = self._store.history()
        groups = found.groups if found and not known else []
        if not known and not (found and groups and all(self._is_whole(group) for group in groups)):
            return
        with self._store.transaction() as state:
            state.number = _next_number(state)
            if found and not known:
                entry = Entry(state.number, found.round, "found", found.number, 0)
                self._store.remember(entry, [Kept(group) for group in groups], self._options.history)
        self._settle()
        self._due.add(ADAPTER_AGREED)
        log.warning("goes on with number %d: higher ones than its own were told of", state.number)

    def _is_whole(self, group: AdapterGroup) -> bool:
        return all(_size(self._store.blob(blob.id)) == blob.bytes for blob in group.blobs.values())

    def _save(self) -> None:
        with self._store.transaction() as state:
            state.seconds = self._seconds

    def _count(self) -> None:
        if self._desk.refusals:
            self._store.refuse(self._desk.refusals)
            self._desk.refusals.clear()
        now = self.blobs.bytes_up, self.blobs.bytes_down
        if now != self._told:
            self._store.traffic(self._store.state.round, now[0] - self._told[0], now[1] - self._told[1])
            self._told = now

    def _publish(self) -> None:
        state, options = self._store.state, self._options
        if ADAPTER_CALL in self._due and 0 < state.round >= state.heard_round:
            seconds = max(1.0, state.ends - self._seconds if state.collecting else options.collect)
            call = AdapterCall(
                state.round,
                seconds,
                self.url,
                options.strategy,
                self._desk.most_bytes,
                min(options.spread, seconds / 2),
            )
            self._send(ADAPTER_CALL, encode(call))
        if ADAPTER_AGREED in self._due and 0 < state.number >= state.heard_number:
            groups = [kept.group for kept in self._store.content()]
            self._send(ADAPTER_AGREED, encode(AdapterAgreed(state.number, state.round, self.url, groups)))

    def _send(self, kind: Topic, payload: bytes) -> None:
        if self._home.publish(self._cluster.path(kind, EDGE), payload, qos=kind.qos, retain=kind.retained):
            self._due.discard(kind)

    def _settle(self) -> None:
        """Files follow what was decided."""
        self._store.sweep(self._options.disk_bytes)
        self._desk.agreed = {blob.id for kept in self._store.content() for blob in kept.group.blobs.values()}


def _next_number(state: State) -> int:
    return min(max(state.number, state.heard_number) + 1, MAX_NUMBER)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
