"""The device learns when to ask: from its ledger, its goal and what the others learned to the policy's threshold."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from agent.learn import goals
from agent.learn.goals import Goal
from agent.learn.ledger import Ledger
from agent.learn.ledger_rows import Features, Outcome, Row
from agent.learn.personal import personal, statistics
from agent.learn.sample import Own
from agent.loop import Token
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance
from protocol import rounds
from protocol.errors import ConfigError, StoreError
from protocol.rounds import Learned

log = logging.getLogger(__name__)

GOAL, STATE = "goal", "learner"  # names of what is kept in the ledger
ENOUGH = 20.0  # steps near the threshold, from which on the configured one has no say any more

_ANSWERED = {Provenance.MEMORY: Outcome.MEMORY, Provenance.PEER: Outcome.PEER}


class State(msgspec.Struct, frozen=True):
    """What `skerry policy` shows, as of the last time that something was learned. `own`: by the device's data alone;
    `evidence` None: others have no say in it."""

    threshold: float
    own: float
    evidence: float | None
    goal: dict[str, Any]
    subject: str
    agreed: Learned | None = None


class Learner:
    """Sets `policy.threshold`. `note` is for the engine's thread; everything else for any other. `goal`: as
    configured; one that was set in the ledger goes before it. `measure`, `model` (fingerprint) and goal make the
    subject that a threshold is about."""

    def __init__(self, ledger: Ledger, policy: ThresholdPolicy, goal: Goal, measure: str, model: str) -> None:
        self.policy = policy
        self.ledger = ledger
        self.statistics = [0.0] * len(rounds.STATISTICS)
        self.goal = goal
        self._configured = goal
        self._start = policy.threshold
        self._about = (measure, model)
        self._noted = 0
        self._lock = threading.Lock()  # of what follows
        self._agreed: Learned | None = None
        self._own = Own(policy.threshold, 0.0)
        self._learned_from: tuple[object, ...] = ()
        self._recall()

    @property
    def subject(self) -> str:
        return rounds.subject(*self._about, self.goal.name)

    @property
    def own(self) -> Own:
        """What the device knows by itself."""
        return self._own

    @property
    def agreed(self) -> float:
        """The threshold that any device would have here that has seen nothing itself."""
        return personal(Own(self._start, 0.0), self._agreed, [0.0] * len(rounds.STATISTICS))

    def note(self, token: Token, position: int) -> None:
        """A settled token of an answer for which the cloud could be asked."""
        self._noted += 1
        if token.why is Why.KEEP:
            self.ledger.passed(token.u, self.policy.least_propensity)
            return
        self.ledger.note(
            Row(
                u=token.u,
                propensity=token.propensity,
                least=self.policy.least_propensity,
                outcome=_outcome(token),
                beta=token.beta,
                cost=1 if token.provenance is Provenance.CLOUD else 0,
                features=Features(
                    token.p_draft, position, math.nan if token.reply_seconds is None else token.reply_seconds
                ),
            )
        )

    def heed(self, agreed: Learned | None) -> None:
        """What the others learned of this device's subject."""
        with self._lock:
            self._agreed = agreed
        self.refresh()

    def refresh(self) -> Own | None:
        """Learns from what came in since the last time. None: this goal's threshold is nobody else's business."""
        with self._lock:
            self._set_goal()
            news = (self._noted, self.goal, self._agreed)
            if news != self._learned_from:
                self._learned_from = news
                self._learn()
            return self._own if self.goal.federated else None

    def close(self) -> None:
        """Learns from what is left. The engine has ended by now."""
        self.refresh()
        self.ledger.close()

    def _set_goal(self) -> None:
        goal = goal_of(self.ledger.get, self._configured)
        if goal != self.goal:
            self.goal, self._agreed = goal, None  # what was agreed is about another goal
            self._own = Own(self._start, 0.0)

    def _learn(self) -> None:
        sample, seen = self.ledger.sample(), self.ledger.seen()
        self._own = goals.own(self.goal, sample, seen, self._own.threshold, self.policy.audit)
        self.statistics = statistics(sample, seen)
        self.policy.threshold = self._threshold()
        state = State(
            threshold=self.policy.threshold,
            own=self._own.threshold,
            evidence=self._own.evidence if math.isfinite(self._own.evidence) else None,
            goal=goals.plain(self.goal),
            subject=self.subject,
            agreed=self._agreed,
        )
        try:
            self.ledger.put(STATE, msgspec.json.encode(state))
        except StoreError as error:
            log.warning("%s", error)

    def _threshold(self) -> float:
        if self._agreed is not None or not self.goal.federated:
            return personal(self._own, self._agreed, self.statistics)
        weight = min(1.0, self._own.evidence / ENOUGH)
        return weight * self._own.threshold + (1.0 - weight) * self._start

    def _recall(self) -> None:
        """Goes on where the last process ended."""
        with self._lock:
            self._set_goal()
            state = state_of(self.ledger.get)
            if state is not None and state.goal == goals.plain(self.goal) and state.subject == self.subject:
                self._own = Own(state.own, 0.0 if state.evidence is None else state.evidence)
                self._agreed = state.agreed
                self.policy.threshold = state.threshold


def state_of(get: Callable[[str], bytes | None]) -> State | None:
    """What was learned last, from a ledger's values; None: nothing yet."""
    kept = get(STATE)
    try:
        return msgspec.json.decode(kept, type=State) if kept else None
    except msgspec.DecodeError:
        return None


def goal_of(get: Callable[[str], bytes | None], configured: Goal) -> Goal:
    """The goal in force: what was set in the ledger's values, else what is configured."""
    kept = get(GOAL)
    if not kept:
        return configured
    try:
        return goals.parse(json.loads(kept))
    except (ConfigError, ValueError, TypeError):
        log.warning("the goal that was set cannot be read, so the configured one is used: set it again")
        return configured


def _outcome(token: Token) -> Outcome:
    if token.provenance is Provenance.CLOUD:
        return Outcome.AGREED if token.id == token.draft else Outcome.DIFFERED
    return _ANSWERED.get(token.provenance or Provenance.FALLBACK, Outcome.FALLBACK)
