"""The coordinator: it hears the clusters' reports at their brokers, and tells each of them the whole.

    report ──► Reports, in RAM ──► aligned() ──► SQLite ──► overall, retained, at every broker that is there
    (transports' threads)        └────────── one worker thread, at most once per `pause` ──────────┘

The number of an Overall is on the disk before it is published. If the disk has lost it, it is found again: at the
brokers, which keep the last Overall, and in the reports, which name the one that they have heard. So that nothing older
is told before that was heard, each new connection begins with a message from the coordinator to itself: it comes back
after what the broker had kept.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from protocol.limits import Buckets
from protocol.reading import read
from protocol.rounds import MAX_JUMP, MAX_NUMBER, Overall, decode_overall, decode_report, encode
from protocol.topics import COORDINATOR, EDGE, OVERALL, REPORT, Cluster, Topic
from protocol.transport.base import Delivery, Transport
from server.coordinator.align import AlignOptions, adopted, aligned, fitted
from server.coordinator.reports import Reports, Verdict
from server.coordinator.store import StateFile

log = logging.getLogger(__name__)

ECHO = "overall/echo"  # below the coordinator's own level; nobody else hears it
_TICK_SECONDS = 30.0  # running time is saved this often
_RATE, _BURST = 1.0, 30  # reports per second of one cluster, and at once


@dataclass(slots=True, eq=False)
class Link:
    """A connection to a broker, and the clusters that are reached there: its own, or several over MQTT bridges."""

    transport: Transport
    clusters: Sequence[str]
    echo: bytes = b""  # what it has to come back with
    ready: bool = False  # all that the broker had kept was heard
    there: dict[str, bytes] = field(default_factory=dict)  # the Overall that the broker keeps, by cluster


class Coordinator:
    """None of the transports must be started yet: `start` does that, and `close` ends them and the file.

    `pause`: the least seconds between two publications. `silence`: seconds of running time for which a cluster's last
    report counts. `counts`: what became of messages, by `Verdict`, and `malformed`, `version`, `flood`; `absurd`:
    numbers of ours that were not believed; `disk_errors`.
    """

    def __init__(
        self,
        fleet: str,
        links: Sequence[Link],
        file: StateFile,
        options: AlignOptions,
        *,
        pause: float,
        silence: float,
        clock: Callable[[], float] = time.monotonic,
        nonce: Callable[[], bytes] = lambda: os.urandom(8),
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.links = links
        self._file = file
        self._options = options
        self._pause = pause
        self._nonce = nonce
        self._clusters = {name: Cluster(fleet, name) for link in links for name in link.clusters}
        self._epoch = file.kept.seconds - clock()
        self._clock = clock
        self._changed = threading.Condition()  # of what follows, up to the blank line
        heard = {name: known for name, known in file.kept.heard.items() if name in self._clusters}
        self._reports = Reports(heard, silence)
        self._floods = Buckets(_RATE, _BURST, clock, len(self._clusters))
        self._overall = file.kept.overall
        self._payload = encode(self._overall) if self._overall.number else b""
        self._number = file.kept.number  # the next one is above
        self._raised: set[tuple[str, str]] = set()  # kind of message and cluster that have raised it
        self._found = Overall(0)  # the highest that a broker had kept
        self._unsaved: set[str] = set()
        self._due = False
        self._closing = False

        # Of the worker thread alone.
        self._gone = file.kept.heard.keys() - heard.keys()
        self._groupings = file.kept.groupings
        self._thread = threading.Thread(target=self._work, name="coordinator", daemon=True)
        for link in links:
            self._listen(link)

    def _listen(self, link: Link) -> None:
        link.transport.on_up, link.transport.on_down = partial(self._up, link), partial(self._down, link)
        for name in link.clusters:
            cluster = self._clusters[name]
            told, kept = partial(self._told, name), partial(self._kept, link, name)
            link.transport.subscribe(cluster.path(REPORT, EDGE), told, qos=REPORT.qos)
            link.transport.subscribe(cluster.path(OVERALL, COORDINATOR), kept, qos=OVERALL.qos)
        link.transport.subscribe(self._echo_topic(link), partial(self._echoed, link), qos=OVERALL.qos)

    def _echo_topic(self, link: Link) -> str:
        return self._clusters[link.clusters[0]].path(OVERALL._replace(suffix=ECHO), COORDINATOR)

    def start(self) -> None:
        """Begins to connect to all brokers."""
        self._thread.start()
        for link in self.links:
            link.transport.start()

    def close(self) -> None:
        """Saves what was heard. What was told stays at the brokers: the clusters go on with it."""
        for link in self.links:
            link.transport.close()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._file.close()

    # On the transports' threads.

    def _up(self, link: Link) -> None:
        with self._changed:
            link.echo, link.ready = self._nonce(), False
            link.there.clear()
        link.transport.publish(self._echo_topic(link), link.echo, qos=OVERALL.qos)

    def _down(self, link: Link) -> None:
        with self._changed:
            link.ready = False

    def _echoed(self, link: Link, delivery: Delivery) -> None:
        with self._changed:
            if delivery.payload == link.echo:
                link.ready = True
                self._wake()

    def _told(self, cluster: str, delivery: Delivery) -> None:
        """The report of a cluster. An empty message takes it away from the broker; what it said ages as usual."""
        with self._changed:
            if not self._floods.take(cluster):
                self.counts["flood"] += 1
                return
        report = read(decode_report, delivery.payload, self.counts) if delivery.payload else None
        if report is None:
            return
        with self._changed:
            verdict = self._reports.take(cluster, report, self._now(), retained=delivery.retained)
            self.counts[verdict] += 1
            if verdict is Verdict.ACCEPTED:
                self._unsaved.add(cluster)
                self._rise(REPORT, cluster, max((told.overall for told in report.subjects.values()), default=0))
                self._wake()
        if verdict is Verdict.OLD:
            log.warning("cluster %s: a report is refused: there was one with a higher number", cluster)

    def _kept(self, link: Link, cluster: str, delivery: Delivery) -> None:
        """What is at the broker on our own topic: ours, or of a former self whose file is lost."""
        overall = read(decode_overall, delivery.payload, self.counts) if delivery.payload else None
        with self._changed:
            if delivery.retained or not delivery.payload:
                link.there[cluster] = delivery.payload
            if overall is not None and self._rise(OVERALL, cluster, overall.number):
                self._found = overall
            if link.there.get(cluster) != self._payload:
                self._wake()

    def _rise(self, kind: Topic, cluster: str, number: int) -> bool:
        """Goes on above a number that was heard. Each source is believed once: an honest one cannot know of a number
        above ours again before we lose it again. Our own topic is more trusted than what a report says of it."""
        source = (kind.suffix, cluster)
        if number <= self._number:
            return False
        jump = MAX_NUMBER if kind is OVERALL else MAX_JUMP
        if source in self._raised or number > min(self._number + jump, MAX_NUMBER - MAX_JUMP):
            self.counts["absurd"] += 1
            return False
        self._raised.add(source)
        self._number = number
        return True

    def _wake(self) -> None:
        self._due = True
        self._changed.notify()

    def _now(self) -> float:
        return self._epoch + self._clock()

    # On the worker thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                patience = min(_TICK_SECONDS, self._reports.seconds_left(self._now()) + 0.01)
                self._changed.wait_for(lambda: self._due or self._closing, patience)
                self._changed.wait_for(lambda: self._closing, self._pause)
                if self._closing:
                    break
                self._due = False
            try:
                self._align()
                self._save()
                self._publish()
            except Exception as error:  # of what some report says: the next ones may be different
                log.error("the clusters cannot be brought together: %s: %s", type(error).__name__, error)
        self._save()

    def _align(self) -> None:
        with self._changed:
            reports = self._reports.present(self._now())
            found, number = self._found, self._number + 1
        groupings = {**adopted(found), **self._groupings}
        last = max(self._overall.number, found.number)
        wholes, groupings = aligned(reports, groupings, last, number, self._options)
        if not wholes:
            return  # nobody counts: the last word stays, as it would without a coordinator
        self._groupings = groupings
        overall = fitted(Overall(number, wholes))
        with self._changed:
            outdated = self._number > self._overall.number  # by what was heard of a former self
            if outdated or overall.subjects != self._overall.subjects:
                self._number += 1
                self._overall = Overall(self._number, overall.subjects)
                self._payload = encode(self._overall)
                log.info("overall %d: %d subjects of %d clusters", self._number, len(wholes), len(reports))

    def _save(self) -> None:
        """If the disk refuses, everything goes on in RAM and is tried again."""
        with self._changed:
            names, self._unsaved = self._unsaved, set()
            heard = {name: self._reports.heard[name] for name in names}
            seconds, number = self._now(), self._number
        try:
            self._file.write(seconds, self._overall, number, heard, self._gone, self._groupings)
        except sqlite3.Error as error:
            self.counts["disk_errors"] += 1
            log.error("the coordinator's state cannot be saved: %s", error)
            with self._changed:
                self._unsaved |= names

    def _publish(self) -> None:
        """To every cluster whose broker is there and keeps another one."""
        with self._changed:
            if self._number > self._overall.number:
                return  # a former self was heard of meanwhile, which said more: it is the next turn's
            for link in self.links:
                for name in link.clusters if link.ready and self._payload else ():
                    if link.there.get(name) == self._payload:
                        continue
                    topic = self._clusters[name].path(OVERALL, COORDINATOR)
                    if link.transport.publish(topic, self._payload, qos=OVERALL.qos, retain=True):
                        link.there[name] = self._payload
                    else:
                        self._due = True
