"""The rounds of one cluster (protocol/rounds.py has the messages).

    idle ──next, or an order──► Call ──► collecting ──quorum or deadline──► aggregate ──► Agreed, Report ──► idle

A thread of its own drives them; updates come in on the transport's. Every step is one transaction, and is published
when that is on the disk, and again after each reconnection: whoever kills the edge in between finds it at the same
place. Time is the edge's own: it stands still while the edge is not running or not connected.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from protocol.errors import ProtocolError
from protocol.reading import read
from protocol.rounds import (
    Agreed,
    Call,
    Told,
    decode_agreed,
    decode_call,
    decode_overall,
    decode_update,
    encode,
)
from protocol.sums import Sum
from protocol.topics import AGREED, CALL, COORDINATOR, EDGE, OVERALL, REPORT, UPDATE, Cluster, Topic
from protocol.transport.base import Delivery, Transport
from server.edge.admission import Admission
from server.edge.levels import Kept, Recipe, agreed, conclude, conclude_secure, merged, report
from server.edge.number_store import Entry, Order, State
from server.edge.round_store import RoundStore

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_RETRY_SECONDS = 5.0  # after an error
_SAVE_SECONDS = (30.0, 1.0)  # between two times that the clock is written down: idle, collecting
_REPAIR_SECONDS = 60.0  # two edges under one name must not outbid each other at full speed
_MOST_REFUSALS = 10_000  # that are told apart between two ticks


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """Seconds: `every`, from one round to the next; `collect`, at most, in one; `spread`, over which devices spread
    their updates. A round ends early once `devices` have answered, and `share` of those that took part in one of the
    last three, whose time to answer is `spread`; 0: not counted. `least`: devices that an aggregate rests on.
    `history`: numbers kept. `settle`: seconds after connecting in which the broker hands out what it keeps."""

    every: float = 3600.0
    collect: float = 120.0
    spread: float = 30.0
    devices: int = 0
    share: float = 1.0
    least: int = 1
    recipe: Recipe = field(default_factory=Recipe)
    history: int = 50
    settle: float = 1.0


class Collector(Protocol):
    """Collects the updates of a secure round, of which the edge learns the sum alone. It subscribes by itself, and is
    called by the thread of the rounds. What it has collected ends with the process: the round is called anew then."""

    def begin(self, round: int, seconds: float) -> None:
        """A round was called; whatever was collected before is void."""

    def enough(self) -> bool:
        """Asked a few times a second while the round runs. True: nothing more is to be expected."""

    def finish(self) -> Sequence[tuple[str, Sum]]:
        """Of each cohort, with its subject; the round has ended."""


class Rounds:
    """Subscribes at `home`, which must not be started yet; whose `on_up` and `on_down` have to call `up` and `down`.
    `clock`: monotonic. `counts`: messages that were ignored, and why. With a `collector` rounds are secure."""

    def __init__(
        self,
        cluster: Cluster,
        home: Transport,
        store: RoundStore,
        options: RoundOptions | None = None,
        collector: Collector | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._cluster = cluster
        self._home = home
        self._store = store
        self._options = options or RoundOptions()
        self._collector = collector
        self._clock = clock
        self._random = random or Random()
        self._lock = threading.RLock()  # of the store and of what follows
        self._admission = Admission(clock)
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._overall = store.overall()
        self._found: Agreed | None = None  # at the broker, while the history is empty
        self._due = {CALL, AGREED, REPORT}
        self._wanted = 0  # answers, of those that took part lately
        self._seconds = store.state.seconds
        self._looked = clock()
        self._up_at = math.inf
        self._repaired = -math.inf
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        home.subscribe(cluster.path(CALL, EDGE), self._own_call, qos=CALL.qos)
        home.subscribe(cluster.path(AGREED, EDGE), self._own_agreed, qos=AGREED.qos)
        home.subscribe(cluster.path(OVERALL, COORDINATOR), self._heard_overall, qos=OVERALL.qos)
        home.subscribe(cluster.path(UPDATE), self._updated, qos=UPDATE.qos)

    def start(self) -> None:
        with self._lock:
            if self._collector and self._store.state.collecting:  # what it had collected is gone
                with self._store.transaction() as state:
                    state.collecting, state.next = 0, state.seconds
            self._wanted = self._quorum()
        self._thread.start()

    def close(self) -> None:
        """What is retained at the broker stays."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            try:
                self._count_refusals()
                self._save()
            except sqlite3.Error as error:
                log.error("what was last counted could not be kept: %s", error)
            self._store.close()

    def up(self) -> None:
        with self._lock:
            self._up_at = self._clock()
            self._due = {CALL, AGREED, REPORT}

    def down(self) -> None:
        with self._lock:
            self._up_at = math.inf

    # What comes in, on the transport's thread

    def _updated(self, delivery: Delivery) -> None:
        device = self._cluster.sender(delivery.topic)
        if device is None:
            self.counts["malformed"] += 1
            return
        with self._lock:
            try:
                reason = self._judged(device, delivery)
            except sqlite3.Error as error:
                self.counts["disk"] += 1
                log.error("an update could not be kept: %s", error)
                return
            if reason is not None and len(self._refusals) < _MOST_REFUSALS:
                self._refusals[device, reason] += 1

    def _judged(self, device: str, delivery: Delivery) -> str | None:
        """Keeps the update, or says why not."""
        if delivery.retained:
            return "retained"
        if self._admission.floods(device):
            return "flood"
        try:
            update = decode_update(delivery.payload)
        except ProtocolError:
            return "malformed"
        if update is None:
            return "version"
        state = self._store.state
        reason = self._admission.judge(update, state.round, state.floor)
        if update.base > max(state.number, state.heard_number) or update.round > max(state.round, state.heard_round):
            self._store.lift(device, update.base, update.round)
        if reason is None and not self._collector:
            return self._store.accept(device, update)
        if reason != "noise":
            self._store.released(device, update.noise)
        return reason or "not_secure"

    def _own_call(self, delivery: Delivery) -> None:
        call = read(decode_call, delivery.payload, self.counts) if delivery.payload else None
        with self._lock:
            if call is not None and call.round > max(self._store.state.round, self._store.state.heard_round):
                self._store.hear(0, call.round)

    def _own_agreed(self, delivery: Delivery) -> None:
        told = read(decode_agreed, delivery.payload, self.counts) if delivery.payload else None
        with self._lock:
            if told is not None and told.number > max(self._store.state.number, self._store.state.heard_number):
                self._store.hear(told.number, told.round)
                self._found = told

    def _heard_overall(self, delivery: Delivery) -> None:
        overall = read(decode_overall, delivery.payload, self.counts) if delivery.payload else None
        with self._lock:
            if overall is None or (self._overall and overall.number <= self._overall.number):
                return
            with self._store.transaction() as state:
                self._store.keep_overall(overall.number, delivery.payload)
                state.number = _next_number(state)
            self._overall = overall
            self._due.add(AGREED)

    # What is done about it, on the thread of the rounds

    def _run(self) -> None:
        pause = _TICK_SECONDS
        while not self._closing.wait(pause):
            try:
                with self._lock:
                    self._tick()
                pause = _TICK_SECONDS
            except Exception as error:  # a disk that is full, say: a later tick may do better
                log.error("the rounds cannot go on: %s: %s", type(error).__name__, error)
                pause = _RETRY_SECONDS

    def _tick(self) -> None:
        now = self._clock()
        settled = self._home.connected and now - self._up_at >= self._options.settle
        if settled:
            self._seconds += max(0.0, now - self._looked)
        self._looked = now
        self._count_refusals()
        if not settled:
            return
        for order in self._store.orders():
            self._obey(order)
        state = self._store.state
        if state.heard_number > state.number and now - self._repaired >= _REPAIR_SECONDS:
            self._repaired = now
            self._renumber()
        if state.collecting and self._over():
            self._conclude()
        elif not state.collecting and not state.held and (self._seconds >= state.next or self._behind()):
            self._begin()
        elif self._seconds - state.seconds >= _SAVE_SECONDS[state.collecting]:
            self._save()
        self._publish()

    def _behind(self) -> bool:
        return self._store.state.heard_round > self._store.state.round

    def _begin(self) -> None:
        options = self._options
        with self._store.transaction() as state:
            if state.heard_round > state.round:
                state.floor = state.heard_round  # nobody knows whose updates have counted there
            state.round = max(state.round, state.heard_round) + 1
            state.collecting, state.seconds = 1, self._seconds
            state.began, state.ends = self._seconds, self._seconds + options.collect
            state.next = self._seconds + options.every
        self._wanted = self._quorum()
        if self._collector:
            self._collector.begin(state.round, options.collect)
        self._due.add(CALL)
        log.info("round %d begins", state.round)

    def _quorum(self) -> int:
        return math.ceil(self._options.share * self._store.lately())

    def _over(self) -> bool:
        state, options = self._store.state, self._options
        if self._seconds >= state.ends:
            return True
        if self._collector:
            return self._collector.enough()
        if not options.devices and not self._wanted:
            return False
        asked = self._seconds >= state.began + options.spread or not self._wanted
        return asked and self._store.answered() >= max(options.devices, self._wanted)

    def _conclude(self) -> None:
        round = self._store.state.round
        sums = self._collector.finish() if self._collector else None
        with self._store.transaction() as state:
            new = (
                self._aggregated(round)
                if sums is None
                else conclude_secure(sums, round, self._options.recipe, self._options.least)
            )
            devices = max((of.told.level.devices for of in new.values()), default=0)
            devices = max(devices, self._store.counted_in(round))
            if new:
                state.number = _next_number(state)
                content = merged(self._store.content(), new, round)
                entry = Entry(state.number, round, "round", state.number, devices)
                self._store.remember(entry, content, self._options.history)
                self._due |= {AGREED, REPORT}
            state.collecting, state.seconds = 0, self._seconds
            self._store.forget(state)
        log.info("round %d ends: %d devices, number %d", round, devices, state.number)

    def _aggregated(self, round: int) -> dict[str, Kept]:
        """In a transaction: by subject, of all that waits."""
        new: dict[str, Kept] = {}
        overall = self._overall
        for subject, pending in self._store.pending().items():
            whole = overall.subjects.get(subject) if overall else None
            number = overall.number if overall else 0
            recipe, least = self._options.recipe, self._options.least
            kept, wrong = conclude(pending, round, whole, number, recipe, least, self._random)
            if not kept.told.level.devices:
                continue
            new[subject] = kept
            self._store.counted(subject, round)
            self._refusals.update((device, "implausible") for device in wrong)
        return new

    def _obey(self, order: Order) -> None:
        with self._store.transaction() as state:
            self._store.done(order)
            if order.kind == "round" and not state.collecting:
                state.next = self._seconds
            elif order.kind == "hold":
                state.held, state.collecting = 1, 0  # what has come in waits for the next round
            elif order.kind == "resume":
                state.held = 0
            elif order.kind == "rollback":
                self._roll_back(state, order.number)
        if order.kind == "hold" and self._collector:
            self._collector.finish()
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
        self._due |= {AGREED, REPORT}

    def _renumber(self) -> None:
        """Somebody knows a higher number than ours: we lost it, or another edge serves this cluster too."""
        found, self._found = self._found, None
        known = self._store.history() or self._overall
        if not known and not found:
            return
        with self._store.transaction() as state:
            state.number = _next_number(state)
            if found and not self._store.history():
                content = {s: Kept(Told(of.cluster), found.round) for s, of in found.subjects.items() if of.cluster}
                entry = Entry(state.number, found.round, "found", found.number, 0)
                self._store.remember(entry, content, self._options.history)
        self._due |= {AGREED, REPORT}
        log.warning("goes on with number %d: higher ones than its own were told of", state.number)

    def _save(self) -> None:
        with self._store.transaction() as state:
            state.seconds = self._seconds

    def _count_refusals(self) -> None:
        if not self._refusals:
            return
        self._store.refuse(self._refusals)
        reasons: Counter[str] = Counter()
        for (_, reason), count in self._refusals.items():
            reasons[reason] += count
        log.info("refused: %s", ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())))
        self._refusals.clear()

    def _publish(self) -> None:
        state = self._store.state
        if CALL in self._due and 0 < state.round >= state.heard_round:
            seconds = state.ends - self._seconds if state.collecting else self._options.collect
            call = Call(state.round, max(1.0, seconds), self._options.spread, secure=self._collector is not None)
            self._send(CALL, encode(call))
        if self._due & {AGREED, REPORT} and 0 < state.number >= state.heard_number:
            content = self._store.content()
            self._send(AGREED, agreed(state.number, state.round, content, self._overall))
            self._send(REPORT, report(state.number, content))

    def _send(self, kind: Topic, payload: bytes) -> None:
        if kind in self._due and self._home.publish(
            self._cluster.path(kind, EDGE), payload, qos=kind.qos, retain=kind.retained
        ):
            self._due.discard(kind)


def _next_number(state: State) -> int:
    return max(state.number, state.heard_number) + 1
