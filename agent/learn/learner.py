"""The device learns when to ask: from its ledger, its goal and what the others learned to the policy's threshold."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from agent.learn import goals
from agent.learn.goals import Goal
from agent.learn.ledger import Ledger
from agent.learn.ledger_rows import Features, Outcome, Row
from agent.learn.personal import in_force, personal, statistics
from agent.learn.sample import Own
from agent.loop import Token
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance
from protocol import rounds
from protocol.errors import ConfigError, StoreError
from protocol.rounds import Learned

log = logging.getLogger(__name__)

GOAL, STATE = "goal", "learner"  # names of what is kept in the ledger

_SHARE = 100  # it learns again when this part of what it knows is new: reading a full ledger takes a tenth of a second
_NOTHING = [0.0] * len(rounds.STATISTICS)  # the statistics of who has seen nothing
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


class Finding(NamedTuple):
    """What a device has to tell of `subject`. `threshold`, `evidence`: as in Own; `statistics`: as
    protocol.rounds.STATISTICS. `agreed`: the threshold of any device here that has seen nothing itself."""

    subject: str
    threshold: float
    evidence: float
    statistics: list[float]
    agreed: float


class Learner:
    """Sets `policy.threshold`. `note` is for the engine's thread; everything else for any other. `goal`: as
    `configured`; one that was set in the ledger goes before it. `measure`, `model` (fingerprint), `adapter` (the id of
    one that it writes with) and goal make the subject that a threshold is about."""

    def __init__(
        self, ledger: Ledger, policy: ThresholdPolicy, goal: Goal, measure: str, model: str, adapter: str = ""
    ) -> None:
        self.policy = policy
        self.ledger = ledger
        self.goal = self.configured = goal
        self.measure = measure
        self.model = model
        self.adapter = adapter
        self._start = policy.threshold
        self._noted = self._enough = 0  # steps so far, and at which number of them it is worth learning again
        self._lock = threading.Lock()  # of what follows
        self._heard: Mapping[str, Learned] = {}  # by subject
        self._agreed: Learned | None = None
        self._own = Own(policy.threshold, 0.0)
        self._statistics = _NOTHING
        self._learned_for: tuple[Goal, Learned | None] | None = None
        self._failing = self._closed = False
        self._recall()

    @property
    def subject(self) -> str:
        writer = f"{self.model}+{self.adapter}" if self.adapter else self.model
        return rounds.subject(self.measure, writer, self.goal.name)

    @property
    def own(self) -> Own:
        """What the device knows by itself."""
        return self._own

    def note(self, token: Token, position: int) -> None:
        """A settled token of an answer for which the cloud could be asked. What others wrote says nothing here."""
        if token.adapter != self.adapter:
            return
        if token.why is Why.KEEP:
            self.ledger.passed(token.u, token.least)
        else:
            row = Row(
                u=token.u,
                propensity=token.propensity,
                least=token.least,
                outcome=_outcome(token),
                beta=token.beta,
                cost=1 if token.provenance is Provenance.CLOUD else 0,
                features=Features(token.p_draft, position, token.reply_seconds),
            )
            self.ledger.note(row)
        self._noted += 1

    def heed(self, agreed: Mapping[str, Learned]) -> None:
        """What the others learned, by subject."""
        with self._lock:
            self._heard, self._agreed = agreed, agreed.get(self.subject)
        self.refresh()

    def refresh(self) -> Finding | None:
        """Learns from what came in since the last time. None: this goal's threshold is nobody else's business. A ledger
        that fails is told of in the log, and tried again the next time."""
        with self._lock:
            try:
                self._catch_up()
                self._failing = False
            except StoreError as error:
                if not self._failing:
                    log.warning("%s", error)
                self._failing = True
            if not self.goal.federated:
                return None
            agreed = personal(Own(self._start, 0.0), self._agreed, _NOTHING)
            return Finding(self.subject, self._own.threshold, self._own.evidence, self._statistics, agreed)

    def close(self) -> None:
        """Learns from what is left. The engine has ended by now. Idempotent."""
        if not self._closed:
            self._closed = True
            self.refresh()
            self.ledger.close()

    # From here on: with the lock.

    def _catch_up(self) -> None:
        self._set_goal()
        noted, wanted = self._noted, (self.goal, self._agreed)
        if noted >= self._enough or wanted != self._learned_for:
            known = self._learn()
            self._enough, self._learned_for = noted + 1 + known // _SHARE, wanted

    def _set_goal(self) -> None:
        goal = goal_of(self.ledger.get, self.configured)
        if goal != self.goal:
            self.goal = goal
            self._agreed = self._heard.get(self.subject)  # what was agreed so far is about another goal
            self._own = Own(self._start, 0.0)

    def _learn(self) -> int:
        """How many steps that rests on."""
        sample, seen = self.ledger.sample(), self.ledger.seen()
        self._own = goals.own(self.goal, sample, seen, self._own.threshold, self.policy.audit)
        self._statistics = statistics(sample, seen)
        self.policy.threshold = in_force(self._own, self._agreed, self._statistics, self._start)
        state = State(
            threshold=self.policy.threshold,
            own=self._own.threshold,
            evidence=self._own.evidence if math.isfinite(self._own.evidence) else None,
            goal=goals.plain(self.goal),
            subject=self.subject,
            agreed=self._agreed,
        )
        self.ledger.put(STATE, msgspec.json.encode(state))
        return len(sample)

    def _recall(self) -> None:
        """Goes on where the last process ended."""
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
    except (msgspec.DecodeError, UnicodeDecodeError):
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
