"""The rounds of a simulated fleet: the edges' and the coordinator's own functions and messages, without a broker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from agent.learn.sample import Own
from protocol.rounds import (
    Call,
    Learned,
    Overall,
    Update,
    decode_agreed,
    decode_report,
    encode,
    subject,
)
from protocol.topics import AGREED, CALL, COORDINATOR, EDGE, OVERALL, REPORT, UPDATE, Cluster, Topic
from protocol.transport.inbox import packet_bytes
from server.coordinator.align import AlignOptions, aligned
from server.coordinator.groups import Grouping
from server.edge.levels import Kept, Pending, Recipe, agreed, conclude, merged, report
from tools.eval.fleets import Rows

LEAST_DEVICES = 1  # of an aggregate, as in server/edge/config.py
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class News:
    """What one device tells in a round."""

    own: Own
    statistics: list[float]


class Exchange:
    """`cluster`, `kind` (devices,): where each device is, and which model it has; thresholds of different models are
    not averaged. `coordinated`: there is a coordinator; `similar`: it groups devices by their statistics. `up`, `down`:
    bytes to the servers and from them, of all devices and edges."""

    def __init__(
        self, cluster: Rows, kind: Rows, *, coordinated: bool, similar: bool = False, recipe: Recipe | None = None
    ) -> None:
        self._cluster = [int(place) for place in cluster]
        self._subject = [subject("entropy", f"model {one}", "price") for one in kind]
        self._coordinated = coordinated
        self._recipe = recipe or Recipe()
        self._options = AlignOptions(similarity=similar)
        self._kept: dict[int, dict[str, Kept]] = {place: {} for place in sorted(set(self._cluster))}
        self._overall = Overall(0)
        self._groupings: dict[str, Grouping] = {}
        self._before = np.full(len(self._cluster), math.nan)
        self._number = 0
        self.up = self.down = 0

    def round(self, news: Sequence[News | None]) -> list[Learned]:
        """What each device hears at the end. None: the device knows too little to say anything."""
        self._number += 1
        for place in self._kept:
            self._conclude(place, news)
        for at, told in enumerate(news):
            if told is not None:
                self._before[at] = told.own.threshold
        if self._coordinated:
            self._align()
        heard = {place: self._agree(place, news) for place in self._kept}
        return [heard[place].get(name, Learned()) for place, name in zip(self._cluster, self._subject, strict=True)]

    def _conclude(self, place: int, news: Sequence[News | None]) -> None:
        """The round of one edge."""
        found = {}
        for name in dict.fromkeys(self._subject):
            told = {
                at: one
                for at, one in enumerate(news)
                if one is not None and self._cluster[at] == place and self._subject[at] == name
            }
            if told:
                pending = Pending(
                    devices=[f"device-{at}" for at in told],
                    rounds=np.full(len(told), float(self._number)),
                    thresholds=np.array([one.own.threshold for one in told.values()]),
                    evidence=np.array([one.own.evidence for one in told.values()]),
                    statistics=np.array([one.statistics for one in told.values()]),
                    before=self._before[list(told)],
                )
                found[name], _ = conclude(
                    pending,
                    self._number,
                    self._overall.subjects.get(name),
                    self._overall.number,
                    self._recipe,
                    LEAST_DEVICES,
                    Random(self._number),
                )
        self._kept[place] = merged(self._kept[place], found, self._number)

    def _align(self) -> None:
        reports = {}
        for place, kept in self._kept.items():
            message = report(self._number, kept)
            self.up += _bytes(REPORT, place, EDGE, message)
            decoded = decode_report(message)
            assert decoded is not None
            reports[str(place)] = decoded
        last = self._overall.number
        wholes, self._groupings = aligned(reports, self._groupings, last, last + 1, self._options)
        self._overall = Overall(last + 1, wholes)
        self.down += sum(_bytes(OVERALL, place, COORDINATOR, encode(self._overall)) for place in self._kept)

    def _agree(self, place: int, news: Sequence[News | None]) -> dict[str, Learned]:
        """What the devices of one cluster hear; counts what they were called by, and what they said."""
        overall = self._overall if self._coordinated else None
        message = agreed(self._number, self._number, self._kept[place], overall)
        called = encode(Call(self._number, _SECONDS))
        for at, one in enumerate(news):
            if self._cluster[at] == place:
                self.down += _bytes(CALL, place, EDGE, called) + _bytes(AGREED, place, EDGE, message)
                if one is not None:
                    self.up += _bytes(UPDATE, place, f"device-{at}", encode(self._update(at, one)))
        decoded = decode_agreed(message)
        assert decoded is not None
        return decoded.subjects

    def _update(self, at: int, one: News) -> Update:
        return Update(
            round=self._number,
            base=self._number - 1,
            subject=self._subject[at],
            threshold=one.own.threshold,
            evidence=one.own.evidence,
            statistics=one.statistics,
        )


def _bytes(kind: Topic, place: int, sender: str, payload: bytes) -> int:
    return packet_bytes(Cluster("fleet", f"cluster-{place}").path(kind, sender), payload, kind.qos)
