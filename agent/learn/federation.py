"""The device's part in the rounds of its cluster: it answers each Call once, and heeds what was Agreed.

    Call(round)  ──►  wait a random part of `spread`  ──►  learn  ──►  Update(round)  ──►  acknowledged: answered

A Call is retained, so a device that was away for a month hears it when it is back, and takes part by itself. An update
that the broker did not acknowledge is sent again when the Call is heard again, which is after every reconnection; the
edge counts it once. To an edge that calls a lower round than one that was answered, the update says so: it has lost its
state, and goes on above.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from agent.learn.learner import Learner
from agent.learn.noise import released, releases_with, spent
from agent.learn.secure_link import SecureLink
from protocol.errors import StoreError
from protocol.reading import read
from protocol.rounds import Agreed, Call, Update, decode_agreed, decode_call, encode
from protocol.topics import AGREED, CALL, EDGE, UPDATE, Cluster
from protocol.transport.base import Delivery, Transport

log = logging.getLogger(__name__)

PAST = "rounds"  # its name among the ledger's values
EVENTS = (
    "called",
    "sent",
    "acknowledged",
    "agreed",
    "nothing_learned",
    "not_secure",
    "privacy_spent",
    "not_connected",
    "out_of_date",
    "malformed",
    "version",
)
LEAST_EVIDENCE = 3.0  # rows; what rests on fewer would only tell the others where this device started


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """`secure`: take part only where the edge learns the sum alone. `clip`, `noise`: as in Update. `epsilon`, `delta`:
    the privacy that may be spent; 0: no limit."""

    secure: bool = False
    clip: float = 0.1
    noise: float = 0.0
    epsilon: float = 0.0
    delta: float = 1e-5


class Past(msgspec.Struct, frozen=True):
    """Of this device in the rounds of `cluster`. `answered`: the last one that it took part in. `number`: of the last
    Agreed. `leaked`: 1 / noise^2 of all its updates with noise, wherever, added up."""

    cluster: str = ""
    answered: int = 0
    number: int = 0
    leaked: float = 0.0

    def spent(self, noise: float, delta: float, more: int = 0) -> float:
        """Epsilon, so far or after `more` updates with this noise; infinite if updates are sent without."""
        return spent(noise, releases_with(noise, self.leaked) + more, delta) if noise else math.inf


class Federation:
    """Subscribes at `transport`, which must not be started yet. `draw`: uniform on [0, 1); `gauss`: standard normal.
    `counts`: by EVENTS."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        transport: Transport,
        learner: Learner,
        options: RoundOptions,
        secure: SecureLink,
        clock: Callable[[], float],
        draw: Callable[[], float],
        gauss: Callable[[], float],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._topic = cluster.path(UPDATE, me)
        self._transport = transport
        self._learner = learner
        self._options = options
        self._secure = secure
        self._clock = clock
        self._draw = draw
        self._gauss = gauss
        self._changed = threading.Condition()  # of what follows
        self._past = self._tried = _past_in(cluster, past_of(learner.ledger.get))
        self._highest = self._past.number  # heard
        self._news: Agreed | None = None  # to be heeded
        self._call: tuple[Call, float] | None = None  # to be answered, and when
        self._sent: Update | None = None  # the last one
        self._behind = 0  # a round below one that was answered: the edge that called it is told once
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        transport.subscribe(cluster.path(CALL, EDGE), self._called, qos=CALL.qos)
        transport.subscribe(cluster.path(AGREED, EDGE), self._agreed, qos=AGREED.qos)

    @property
    def answered(self) -> int:
        """The last round that this device took part in."""
        return self._past.answered

    @property
    def number(self) -> int:
        """Of the last Agreed."""
        return self._past.number

    @property
    def spent(self) -> float:
        """Epsilon, so far; infinite if updates are sent without noise."""
        return self._past.spent(self._options.noise, self._options.delta)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _called(self, delivery: Delivery) -> None:
        call = read(decode_call, delivery.payload, self.counts)
        if call is None:
            return
        with self._changed:
            if call.round in (self._past.answered, self._behind) or (self._call and call.round < self._call[0].round):
                return
            self._behind = min(call.round, self._past.answered)
            self.counts["called"] += 1
            self._call = (call, self._clock() + self._draw() * call.spread)
            self._changed.notify_all()

    def _agreed(self, delivery: Delivery) -> None:
        agreed = read(decode_agreed, delivery.payload, self.counts)
        if agreed is None:
            return
        with self._changed:
            if agreed.number < self._highest:
                self.counts["out_of_date"] += 1
                return
            self.counts["agreed"] += 1
            self._highest, self._news = agreed.number, agreed
            self._changed.notify_all()

    def _run(self) -> None:
        """Learning and the disk take their time, for which the transport's thread must not wait."""
        while not self._closed:
            with self._changed:
                self._changed.wait_for(self._is_something_due, self._until_due())
                call = self._call[0] if self._is_called() and self._call else None
                self._call = None if call else self._call
                news, self._news = self._news, None
            try:
                if news is not None:
                    self._heed(news)
                self._save_if_possible()
                if call is not None and not self._closed:
                    self._answer(call)
            except Exception as error:  # what is wrong with one round must not end the next ones
                log.error("a round was not taken part in: %s", type(error).__name__)
        self._save_if_possible()

    def _heed(self, agreed: Agreed) -> None:
        self._learner.heed(agreed.subjects)
        self._change(number=agreed.number)

    def _is_something_due(self) -> bool:
        return self._closed or self._is_called() or self._news is not None or self._past is not self._tried

    def _is_called(self) -> bool:
        return self._call is not None and self._clock() >= self._call[1]

    def _until_due(self) -> float | None:
        return None if self._call is None else max(0.0, self._call[1] - self._clock())

    def _answer(self, call: Call) -> None:
        """The same once more, if the broker has not acknowledged it: other noise would give more away."""
        if call.secure:
            self._join(call)
            return
        round = max(call.round, self._past.answered)
        update = self._sent if self._sent and self._sent.round == round else self._update(call, round)
        if update is None:
            return
        self._sent = update
        gone = self._transport.publish(
            self._topic, encode(update), qos=UPDATE.qos, done=lambda: self._acknowledged(update)
        )
        self.counts["sent" if gone else "not_connected"] += 1

    def _join(self, call: Call) -> None:
        """Once, whatever becomes of it: a second value under the same round would give the first one away."""
        if call.round <= self._past.answered:
            return
        update = self._update(call, call.round)
        if update is None:
            return
        self._change(answered=call.round)
        self._save()
        self.counts["sent" if self._secure.join(update, call.seconds) else "not_connected"] += 1

    def _update(self, call: Call, round: int) -> Update | None:
        """None: this device has nothing to say, or may not."""
        if self._options.secure and not call.secure:
            self.counts["not_secure"] += 1
            return None
        found = self._learner.refresh()
        if found is None or found.evidence < LEAST_EVIDENCE:
            self.counts["nothing_learned"] += 1
            return None
        exact = Update(
            round=round,
            base=self._past.number,
            subject=found.subject,
            threshold=found.threshold,
            evidence=found.evidence,
            statistics=found.statistics,
        )
        return self._noisy(exact, found.agreed) if self._options.noise else exact

    def _noisy(self, exact: Update, agreed: float) -> Update | None:
        options = self._options
        if options.epsilon and self._past.spent(options.noise, options.delta, 1) > options.epsilon:
            self.counts["privacy_spent"] += 1
            return None
        self._change(leaked=self._past.leaked + options.noise**-2)
        self._save()  # before it is sent: what was sent and not remembered would be privacy spent in silence
        return released(exact, agreed, options.clip, options.noise, self._gauss())

    def _acknowledged(self, update: Update) -> None:
        with self._changed:
            self._change(answered=max(self._past.answered, update.round))
            self.counts["acknowledged"] += 1

    def _change(self, **what: float) -> None:
        with self._changed:
            self._past = msgspec.structs.replace(self._past, **what)
            self._changed.notify_all()

    def _save(self) -> None:
        """Raises StoreError; then it is tried again when there is more to save."""
        if self._past is not self._tried:
            self._tried = self._past
            self._learner.ledger.put(PAST, _encode(self._tried))

    def _save_if_possible(self) -> None:
        try:
            self._save()
        except StoreError as error:
            log.warning("%s", error)


_encode = msgspec.json.Encoder().encode


def past_of(get: Callable[[str], bytes | None]) -> Past:
    """From a ledger's values."""
    kept = get(PAST)
    try:
        return msgspec.json.decode(kept, type=Past) if kept else Past()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Past()


def _past_in(cluster: Cluster, past: Past) -> Past:
    """Rounds and numbers of another cluster mean nothing here."""
    here = f"{cluster.fleet}/{cluster.name}"
    return past if past.cluster == here else Past(here, leaked=past.leaked)
