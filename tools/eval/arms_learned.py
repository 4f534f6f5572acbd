"""Policies that learn a price's threshold, by the product's own functions: alone, in a federation, or in one place."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from agent.learn import goals
from agent.learn.federation import LEAST_EVIDENCE
from agent.learn.personal import in_force, statistics
from agent.learn.sample import Own, Sample
from protocol.rounds import STATISTICS, Learned
from server.edge.levels import Recipe
from tools.eval.fleets import Fleet, Pool, Rows
from tools.eval.play import Bools, Policy, Seen
from tools.eval.rounds import Exchange, News

START = 0.25  # agent/config.py: threshold
AUDIT = 0.01  # agent/config.py: audit
_NOTHING = [0.0] * len(STATISTICS)


class Thresholds(Policy):
    """Escalates where u exceeds the device's threshold, `tau` (devices,)."""

    audit = AUDIT

    def __init__(self, steps: Pool, drawn: Fleet, price: float) -> None:
        super().__init__()
        self.steps = steps
        self.drawn = drawn
        self.goal = goals.Price(price)
        self.tau = np.full(drawn.devices, START)
        self._own = [Own(START, 0.0)] * drawn.devices

    def ask(self, rows: Rows) -> Bools:
        asked: Bools = self.steps.data.u[rows] > self.tau[self.drawn.device[rows]]
        return asked

    def owns(self, seen: Sequence[Seen]) -> list[Own]:
        """What each device knows by itself."""
        data = self.steps.data
        self._own = [
            goals.own(self.goal, one.sample(data, self.audit), one.histogram(data), own.threshold, self.audit)
            for one, own in zip(seen, self._own, strict=True)
        ]
        return self._own


class Local(Thresholds):
    """Each device for itself, as an agent without a broker."""

    def learn(self, at: int, seen: Sequence[Seen]) -> None:
        for device, own in enumerate(self.owns(seen)):
            self.tau[device] = in_force(own, None, _NOTHING, START)


class Flat(Thresholds):
    """One edge, and what it finds is everybody's threshold, whatever model they have. `recipe`: how it averages."""

    recipe = Recipe()

    def __init__(self, steps: Pool, drawn: Fleet, price: float) -> None:
        super().__init__(steps, drawn, price)
        nobody = np.zeros_like(drawn.cluster)
        self._exchange = Exchange(nobody, nobody, coordinated=False, recipe=self.recipe)

    def learn(self, at: int, seen: Sequence[Seen]) -> None:
        told = [News(own, _NOTHING) if own.evidence >= LEAST_EVIDENCE else None for own in self.owns(seen)]
        level = self._exchange.round(told)[0].cluster
        self.learning_bytes = [self._exchange.up, self._exchange.down]
        if level is not None and level.devices:
            self.tau[:] = in_force(Own(START, 0.0), Learned(level), _NOTHING, START)


class FlatMean(Flat):
    recipe = Recipe("mean")


class Hierarchical(Thresholds):
    """Edges, a coordinator, and personal thresholds. `similar`: devices are grouped by their statistics."""

    similar = False

    def __init__(self, steps: Pool, drawn: Fleet, price: float) -> None:
        super().__init__(steps, drawn, price)
        self._exchange = Exchange(drawn.cluster, drawn.kind, coordinated=True, similar=self.similar)

    def learn(self, at: int, seen: Sequence[Seen]) -> None:
        data = self.steps.data
        owns = self.owns(seen)
        traits = [statistics(one.sample(data, self.audit), one.histogram(data)) for one in seen]
        told = [News(own, s) if own.evidence >= LEAST_EVIDENCE else None for own, s in zip(owns, traits, strict=True)]
        heard = self._exchange.round(told)
        self.learning_bytes = [self._exchange.up, self._exchange.down]
        for device, (own, learned, trait) in enumerate(zip(owns, heard, traits, strict=True)):
            if learned.cluster is not None or learned.overall is not None:
                self.tau[device] = in_force(own, learned, trait, START)


class Similar(Hierarchical):
    similar = True


class Centralised(Thresholds):
    """Everybody's samples in one place, and one threshold from them. Each row travels as three numbers."""

    def __init__(self, steps: Pool, drawn: Fleet, price: float) -> None:
        super().__init__(steps, drawn, price)
        self._sent = 0

    def learn(self, at: int, seen: Sequence[Seen]) -> None:
        whole = Sample.join([one.sample(self.steps.data, self.audit) for one in seen])
        fresh = len(whole) - self._sent
        self._sent = len(whole)
        row = len(msgspec.msgpack.encode([0.1, 0.2, 1.0]))
        self.learning_bytes[0] += fresh * row
        self.learning_bytes[1] += self.drawn.devices * len(msgspec.msgpack.encode([at, 0.1]))
        seen_by_all = Seen(all_rows=np.concatenate([one.all_rows for one in seen])).histogram(self.steps.data)
        self.tau[:] = goals.own(self.goal, whole, seen_by_all, float(self.tau[0]), self.audit).threshold
