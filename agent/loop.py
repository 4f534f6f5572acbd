"""The token loop: one answer, token by token.

Written as a generator so that one thread can serve many answers: it yields what it needs next (`Feed` tokens to the
engine, or `Wait` for a reply) and is resumed with the engine's Step. Draft-ahead: while a question is under way the
loop goes on with its own draft; a reply that agrees costs no waiting, one that does not rewinds. Tokens are emitted
in order, each once, when they are settled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from agent.agreement import Agreement
from agent.combine import Weight, combine
from agent.policy import Policy, Why
from agent.resolver import Conversation, Provenance, Question, Reply, State, Ticket
from agent.uncertainty import Measure, Softmax
from models.engine.base import Sequence as Place
from models.engine.base import Step
from models.sampling import shape, softmax, top_ids
from protocol.resolve import Mode, Sampling


class Feed(NamedTuple):
    """Feed these tokens and resume with the Step after the last one."""

    tokens: Sequence[int]


class Wait(NamedTuple):
    """Resume with None when a ticket is done, at the latest at `until` (seconds of the clock)."""

    until: float


Need: TypeAlias = Feed | Wait

_RECENT = 8  # tokens that a question carries; the longest tail of a memory entry


@dataclass(slots=True, eq=False)
class Token:
    """One token of the answer. `provenance` None: not settled yet. `p`: its probability according to whoever produced
    it; `p_draft`: the draft's, according to the SLM. `why`, `propensity`, `least`: as in Decision. `origin`: the other
    device that learned it, if one did. `adapter`: as in Plan. `beta`: rejection probability, where the LLM's opinion of
    the draft is known. `y_ids`, `y_p`: what the LLM itself replied, as in Reply. `wait`: seconds that the loop stood
    still for it; `reply_seconds`: from the question to its reply."""

    id: int
    u: float
    p: float
    provenance: Provenance | None = None
    why: Why = Why.KEEP
    propensity: float = 1.0
    least: float = 1.0
    draft: int = -1
    p_draft: float = 0.0
    origin: str = ""
    adapter: str | None = ""
    beta: float | None = None
    y_ids: NDArray[np.intp] | None = None
    y_p: NDArray[np.float32] | None = None
    wait: float = 0.0
    reply_seconds: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    question: Question | None = None  # not asked yet: enough others are open
    ticket: Ticket | None = None
    logits: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How one answer is to be made. `ahead`: tokens that may be drafted behind an open question; 0 blocks on each
    one. `in_flight`: questions that may be open at once. `weight`: w of mode fuse. `top`: log-probabilities to note
    per token. `adapter`: the id of the one that writes, "" without, None for a mix, whose steps belong to no space of
    the memory."""

    sampling: Sampling
    max_tokens: int
    policy: Policy
    measure: Measure = "entropy"
    mode: Mode = "take"
    weight: Weight = 0.5
    ahead: int = 32
    in_flight: int = 8
    top: int = 0
    adapter: str | None = ""


class TokenLoop:
    """`place` is the answer's sequence in the engine, aligned with the prompt. `conversation` None: no help is asked
    for (offline, private). `agreement` is shared by all answers. `emit` is called with each settled token and returns
    True to stop there."""

    def __init__(
        self,
        plan: Plan,
        place: Place,
        softmax: Softmax,
        eog: frozenset[int],
        conversation: Conversation | None,
        emit: Callable[[Token], bool],
        agreement: Agreement,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.tokens: list[Token] = []
        self.settled = 0
        self.rewinds = 0
        self._stopped = False
        self._place = place
        self._softmax = softmax
        self._eog = eog
        self._conversation = conversation
        self._emit = emit
        self._agreement = agreement
        self._clock = clock
        self._ids: list[int] = []
        self._burst: tuple[int, Ticket] | None = None  # the LLM's continuation after the token at this position

    def run(self, prompt: Sequence[int]) -> Generator[Need, Step | None, str]:
        """Writes the answer to what `prompt` still has to be fed. Returns why it ended: stop or length."""
        start = len(self._place.tokens) + len(prompt)
        step = yield Feed(prompt)
        while True:
            assert step is not None
            self._draft(step)
            self._recall()
            feed = None
            while feed is None:
                replaced = self._settle()
                if self._ask_held():
                    continue
                if ended := self._ended():
                    return ended
                if replaced:
                    self._place.rewind(start + len(self._ids) - 1)
                    feed = self._ids[-1]
                elif self._may_go_ahead():
                    feed = self._ids[-1]
                else:
                    yield from self._wait()
            step = yield Feed((feed,))

    def _draft(self, step: Step) -> None:
        """Scores the step, drafts its token and decides who is to settle it."""
        plan, position = self.plan, len(self._ids)
        belief = self._softmax.load(step.logits)
        x = shape(step.logits, plan.sampling, self._ids, belief.likeliest)
        draft = x.draw_at(plan.sampling.seed, position)
        u = belief.uncertainty(plan.measure, draft, plan.sampling.seed, position)
        p = belief.p(draft)
        token = Token(draft, u, p, draft=draft, p_draft=p, adapter=plan.adapter)
        if plan.top:
            log_p = belief.log_all()
            token.top = [(int(id), float(log_p[id])) for id in top_ids(log_p, plan.top)]
        self.tokens.append(token)
        self._ids.append(draft)
        if self._conversation is None:
            token.provenance = Provenance.LOCAL
            return
        token.why, token.propensity, token.least = plan.policy.decide(u, plan.sampling.seed, position)
        if token.why is Why.KEEP:
            token.provenance = Provenance.LOCAL
            return
        logits = token.logits = step.logits.copy()
        token.question = Question(
            answer=self._ids[:-1],
            draft=draft,
            x=x,
            u=u,
            seed=plan.sampling.seed,
            audit=token.why is Why.AUDIT,
            state=self._state(step, logits, belief),
        )

    def _state(self, step: Step, logits: NDArray[np.float32], belief: Softmax) -> State | None:
        adapter = self.plan.adapter
        if step.hidden is None or adapter is None:
            return None
        return State(step.hidden.copy(), self._place.tokens[-_RECENT:], logits, belief.log_total(logits), adapter)

    def _recall(self) -> None:
        """Settles the last token by what the device knows already."""
        token, position = self.tokens[-1], len(self._ids) - 1
        if token.question is None or self._conversation is None or self._from_burst(position) is not None:
            return
        ticket = self._conversation.known(token.question)
        if ticket is not None and ticket.reply is not None:
            self._take(token, ticket.reply, position)
            self._ids[-1] = token.id
            token.ticket, token.question = ticket, None

    def _ask_held(self) -> bool:
        """Asks the last token's question, if no burst is about to answer it and few enough others are open. True if
        that may have settled it."""
        token = self.tokens[-1] if self.tokens else None
        if token is None or token.question is None or self._conversation is None:
            return False
        known = self._from_burst(len(self._ids) - 1)
        if known is not None:
            self._use_burst(token, known)
            self._ids[-1] = known
        elif self._burst_coming(len(self._ids) - 1) or not self._worth_asking():
            return False
        else:
            token.ticket = self._conversation.ask(token.question)
            if token.ticket is None:
                token.provenance = Provenance.LOCAL if self._conversation.alone else Provenance.FALLBACK
        token.question = None
        return True

    def _worth_asking(self) -> bool:
        """A question behind k open ones is of use only if the replies to all k agree with their drafts. A burst
        follows the last question asked, so nothing is asked behind one that may bring a burst; nor behind one that the
        cloud, which hears them in order, may yet be asked."""
        assert self._conversation is not None
        if any(token.ticket is not None and token.ticket.near for token in self._open()):
            return False
        limit = 1 if self._conversation.bursts else self._agreement.worth_asking(self.plan.in_flight)
        return len(self._open()) < limit

    def _burst_coming(self, position: int) -> bool:
        """Is the token at `position` on its way already? Not believed for longer than a question would be."""
        if self._burst is None:
            return False
        anchor, ticket = self._burst
        patience = ticket.heard_at + (ticket.deadline - ticket.asked_at)
        return position - anchor - 1 < len(ticket.burst) + ticket.coming and self._clock() < patience

    def _settle(self) -> bool:
        """Settles and emits tokens in order. True if a reply replaced a draft: what was drafted behind it is gone."""
        self._pass_on()
        while self.settled < len(self.tokens):
            token = self.tokens[self.settled]
            if token.provenance is None and not self._resolve(token):
                return False
            replaced = token.ticket is not None and token.id != self._ids[self.settled]
            if token.ticket is not None and token.ticket.reply is not None and self._conversation is not None:
                self._conversation.taken(token.ticket)
            if replaced:
                self.rewinds += 1
                self._drop_from(self.settled + 1)
                self._ids[-1] = token.id
            token.ticket = token.logits = None
            self.settled += 1
            if self._emit(token) or token.id in self._eog:
                self._stopped = True
                self._drop_from(self.settled)
                return False
            if replaced:
                return True
        return False

    def _pass_on(self) -> None:
        """Questions that nobody answered go to whoever is next in line, in their order."""
        for token in self._open():
            ticket = token.ticket
            if ticket is None or ticket.last or ticket.reply is not None or self._conversation is None:
                continue
            if ticket.failed or self._clock() >= ticket.deadline:
                token.ticket = self._conversation.again(ticket)
                token.provenance = None if token.ticket else Provenance.FALLBACK
            elif ticket.near:
                return

    def _resolve(self, token: Token) -> bool:
        """Settles one asked token by its reply, by an earlier burst or by the deadline. False: nothing of it yet."""
        ticket, position = token.ticket, self.settled
        if ticket is None or self._conversation is None:
            return False  # its question is still held back
        if ticket.reply is not None:
            self._take(token, ticket.reply, position)
            self._agreement.observe(agreed=token.id == token.draft)
            token.reply_seconds = ticket.replied_at - ticket.asked_at
            if ticket.reply.tokens and token.id == ticket.reply.tokens[0]:
                self._burst = (position, ticket)  # what else the LLM writes follows this very token
        elif (known := self._from_burst(position)) is not None:
            self._use_burst(token, known)
        elif ticket.last and (ticket.failed or self._clock() >= ticket.deadline):
            if not ticket.failed:
                self._conversation.late(ticket)
            token.provenance = Provenance.FALLBACK
        else:
            return False
        return True

    def _take(self, token: Token, reply: Reply, position: int) -> None:
        plan = self.plan
        assert token.logits is not None
        token.id = combine(
            plan.mode,
            plan.weight,
            token.draft,
            token.logits,
            reply,
            plan.sampling,
            self._ids[:position],
            position,
        )
        if reply.y_draft >= 0.0:
            token.beta = max(0.0, 1.0 - reply.y_draft / max(token.p_draft, 1e-9))
        known = np.flatnonzero(reply.y_ids == token.id)
        if len(known):
            token.p = float(reply.y_p[known[0]])
        elif token.id in reply.tokens:
            token.p = reply.tokens_p[list(reply.tokens).index(token.id)]
        token.provenance, token.origin = reply.provenance, reply.origin
        if reply.provenance is Provenance.CLOUD:
            token.y_ids, token.y_p = reply.y_ids, reply.y_p

    def _use_burst(self, token: Token, known: int) -> None:
        assert token.logits is not None
        assert self._burst is not None
        reply = self._burst[1].reply
        assert reply is not None
        token.id, token.provenance = known, reply.provenance
        token.p = float(softmax(token.logits)[known])

    def _from_burst(self, position: int) -> int | None:
        """The LLM's token at `position`, if an earlier reply went on that far and all since agrees with it."""
        if self._burst is None:
            return None
        anchor, ticket = self._burst
        burst = ticket.burst.copy()  # more of it may come in meanwhile
        offset = position - anchor - 1
        so_far = burst[:offset]
        if offset < 0 or self._ids[anchor + 1 :][: len(so_far)] != so_far:
            self._burst = None
            return None
        return burst[offset] if offset < len(burst) else None

    def _ended(self) -> str | None:
        if self.tokens and self.settled == len(self.tokens):
            if self._stopped:
                return "stop"
            if len(self.tokens) >= self.plan.max_tokens:
                return "length"
        return None

    def _open(self) -> list[Token]:
        """Tokens whose questions are under way."""
        return [t for t in self.tokens[self.settled :] if t.ticket is not None and t.provenance is None]

    def _may_go_ahead(self) -> bool:
        return (
            len(self.tokens) - self.settled <= self.plan.ahead
            and len(self.tokens) < self.plan.max_tokens
            and self.tokens[-1].question is None
            and self._ids[-1] not in self._eog
        )

    def _wait(self) -> Generator[Need, Step | None, None]:
        token = self.tokens[self.settled]
        if token.ticket is not None:
            tickets = [other.ticket for other in self._open() if other.ticket is not None]
            until = min(ticket.deadline for ticket in tickets if ticket is token.ticket or not ticket.last)
        else:  # held back for a burst
            assert self._burst is not None
            burst = self._burst[1]
            until = burst.heard_at + (burst.deadline - burst.asked_at)
        began = self._clock()
        yield Wait(until)
        token.wait += self._clock() - began

    def _drop_from(self, position: int) -> None:
        for token in self.tokens[position:]:
            if token.ticket is not None and self._conversation is not None:
                self._conversation.withdraw(token.ticket)
        del self.tokens[position:]
        del self._ids[position:]
