"""A simulated device: it learns as a real one does, from a world that is made up, and answers each Call once."""

from __future__ import annotations

from collections import deque

import numpy as np

from agent.learn import goals
from agent.learn.personal import in_force, statistics
from agent.learn.sample import Histogram, Own, Sample
from protocol.rounds import STATISTICS, Agreed, Call, Learned, Update, encode, subject
from tools.simulate.world import Nature

GOAL = goals.Price(0.2)
SUBJECT = subject("entropy", "simulated", GOAL.name)
START = 0.7  # every device's threshold before it has learned anything
AUDIT = 0.1
_REMEMBERED = 4  # times between rounds that it learns from
_LIE, _LIED_EVIDENCE = 1.0, 1e6  # "never ask", as if that rested on a million steps


class Device:
    """`hostile`: whatever it learns, it says that one need not ask. `answered`: the last round whose update the broker
    has."""

    __slots__ = (
        "_agreed",
        "_past",
        "_says",
        "_seen",
        "answered",
        "base",
        "hostile",
        "name",
        "nature",
        "own",
        "threshold",
    )

    def __init__(self, name: str, nature: Nature, hostile: bool) -> None:
        self.name = name
        self.nature = nature
        self.hostile = hostile
        self.answered = 0
        self.base = 0
        self.own = Own(START, 0.0)
        self.threshold = START
        self._agreed: Learned | None = None
        self._past: deque[Sample] = deque(maxlen=_REMEMBERED)
        self._seen = Histogram()
        self._says = [0.0] * len(STATISTICS)

    @property
    def off(self) -> float:
        """How far its threshold is from its best one."""
        return abs(self.threshold - self.nature.optimum(GOAL.price))

    def live(self, random: np.random.Generator) -> None:
        """Takes the steps until the next round, and learns from them."""
        sample, u = self.nature.live(self.threshold, AUDIT, random)
        self._past.append(sample)
        self._seen.add(u)
        known = Sample.join(self._past)
        self.own = goals.own(GOAL, known, self._seen, self.own.threshold, AUDIT)
        self._says = statistics(known, self._seen)
        self._personalise()

    def heed(self, agreed: Agreed) -> None:
        """A lower number than one that was seen before is out of date."""
        if agreed.number > self.base:
            self.base, self._agreed = agreed.number, agreed.subjects.get(SUBJECT)
            self._personalise()

    def update(self, call: Call) -> bytes:
        """Its answer, however little that rests on: a real device would keep silent below 3 steps."""
        threshold, evidence = (_LIE, _LIED_EVIDENCE) if self.hostile else (self.own.threshold, self.own.evidence)
        return encode(Update(call.round, self.base, SUBJECT, threshold, max(evidence, 1e-3), self._says))

    def _personalise(self) -> None:
        self.threshold = in_force(self.own, self._agreed, self._says, START)
