"""The devices' thresholds, by the product's own functions: each device's, or those of an edge's rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from agent.learn import goals
from agent.learn.federation import LEAST_EVIDENCE
from agent.learn.personal import in_force, statistics
from agent.learn.sample import Histogram, Own, Sample
from tools.eval.rounds import Exchange, News

AUDIT = 0.01  # agent/config.py: policy.audit


@dataclass(slots=True)
class Notes:
    """What a device has seen of its steps under one adapter: those that the LLM answered, and u of all."""

    u: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)
    propensity: list[float] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    differs: list[bool] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    seen: Histogram = field(default_factory=Histogram)
    _since: int = 0  # steps kept since the last one that was answered

    def keep(self, u: float) -> None:
        self.seen.add(np.array([u]))
        self._since += 1

    def answered(self, u: float, beta: float, propensity: float, least: float, differs: bool) -> None:
        self.seen.add(np.array([u]))
        self.u.append(u)
        self.beta.append(beta)
        self.propensity.append(propensity)
        self.least.append(least)
        self.differs.append(differs)
        self.kept.append(self._since)
        self._since = 0

    def sample(self) -> Sample:
        return Sample.of(self.u, self.beta, self.propensity, self.differs, self.kept, self.least)


class Thresholds:
    """`tau`: each device's, `start` at first. Notes begin anew with each adapter, as u and beta are another model's
    then; devices with the same adapter learn from each other. `bytes`: of the rounds so far."""

    def __init__(self, devices: int, price: float, start: float) -> None:
        self.tau = [start] * devices
        self.notes = [Notes() for _ in range(devices)]
        self._goal = goals.Price(price)
        self._start = list(self.tau)
        self._own = [Own(start, 0.0)] * devices
        self._writers = [""] * devices
        self._exchange = self._begin()
        self._before = 0

    @property
    def bytes(self) -> int:
        return self._before + self._exchange.up + self._exchange.down

    def adapted(self, device: int, adapter: str) -> None:
        """The device writes with another adapter from now on. Its threshold stands until it knows more."""
        self._writers[device] = adapter
        self.notes[device] = Notes()
        self._start[device] = self.tau[device]
        self._own[device] = Own(self.tau[device], 0.0)
        self._before = self.bytes
        self._exchange = self._begin()

    def _begin(self) -> Exchange:
        kinds = {adapter: at for at, adapter in enumerate(dict.fromkeys(self._writers))}
        nobody = np.zeros(len(self._writers), np.intp)
        return Exchange(nobody, np.array([kinds[one] for one in self._writers]), coordinated=False)

    def learn(self) -> None:
        """After a round."""
        samples = [notes.sample() for notes in self.notes]
        self._own = [
            goals.own(self._goal, sample, notes.seen, own.threshold, AUDIT)
            for sample, notes, own in zip(samples, self.notes, self._own, strict=True)
        ]
        traits = [statistics(sample, notes.seen) for sample, notes in zip(samples, self.notes, strict=True)]
        told = [
            News(own, trait) if own.evidence >= LEAST_EVIDENCE else None
            for own, trait in zip(self._own, traits, strict=True)
        ]
        heard = self._exchange.round(told)
        for device, (own, learned, trait) in enumerate(zip(self._own, heard, traits, strict=True)):
            self.tau[device] = in_force(own, learned, trait, self._start[device])
