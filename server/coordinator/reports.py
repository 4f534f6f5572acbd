"""The last report of each cluster, and whether it still counts."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.rounds import Report


class Verdict(enum.StrEnum):
    ACCEPTED = "accepted"
    REPEATED = "repeated"  # the one that is known
    OLD = "old"


@dataclass(frozen=True, slots=True)
class Heard:
    """A cluster's last report. `at`: when it came, in seconds of the coordinator's running time."""

    report: Report
    at: float


class Reports:
    """Not thread-safe. `silence`: seconds after which a cluster that says nothing new counts no more."""

    def __init__(self, heard: Mapping[str, Heard], silence: float) -> None:
        self.heard = dict(heard)
        self._silence = silence

    def take(self, cluster: str, report: Report, now: float, *, retained: bool) -> Verdict:
        """Numbers have to grow, by whatever an edge's devices made it go on above: a jump harms that cluster alone, and
        not for longer than `silence`. A cluster that counts no more may begin anew, if it speaks now: what its broker
        had kept may be from long ago."""
        known = self.heard.get(cluster)
        number = known.report.number if known else 0
        if known and report.number <= number and (retained or cluster in self.present(now)):
            return Verdict.OLD if report.number < number else Verdict.REPEATED
        self.heard[cluster] = Heard(report, now)
        return Verdict.ACCEPTED

    def present(self, now: float) -> dict[str, Report]:
        """What counts, by cluster."""
        return {name: known.report for name, known in self.heard.items() if now - known.at <= self._silence}

    def seconds_left(self, now: float) -> float:
        """Until the next of them counts no more; infinite if none does."""
        left = (known.at + self._silence - now for known in self.heard.values())
        return min((seconds for seconds in left if seconds >= 0.0), default=float("inf"))
