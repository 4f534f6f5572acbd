"""The Resolver seam: somebody who may answer an escalation.

A resolver never blocks. It hands out a Ticket, fills it from whatever thread it likes, and calls `wake`; the token
loop goes on drafting and looks at the ticket when it comes round.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from models.sampling import Shaped
from protocol.resolve import Message, Mode, Sampling


class Provenance(StrEnum):
    """Who produced a token."""

    LOCAL = "local"
    MEMORY = "memory"
    PEER = "peer"
    CLOUD = "cloud"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class State:
    """What the SLM had before it at one step. `hidden` (d,): its last hidden state. `recent`: the last tokens, the
    prompt's included. `logits` (V,) and `log_total`, the logarithm of the sum of their exponentials: x at temperature
    1 and without penalties. `adapter`: the id of the one that it wrote with, "" without."""

    hidden: NDArray[np.float32]
    recent: Sequence[int]
    logits: NDArray[np.float32]
    log_total: float
    adapter: str = ""

    def p(self, token: int) -> float:
        """x of this token."""
        return math.exp(float(self.logits[token]) - self.log_total)


class Reach(StrEnum):
    """Who may hear a question. CLOUD: something was hidden from it; peers are not asked, and nothing is learned that
    they could be told."""

    ANYONE = "anyone"
    CLOUD = "cloud"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One step that is to be resolved. `answer`: the tokens before it, prompt not counted, unsettled drafts
    included. `x`: the SLM's sampling distribution. `audit`: asked to learn what the LLM would say, so nobody else's
    answer will do. `state` None: the engine gives no hidden states, or several adapters are mixed. `reach`: who may
    hear it, the own memory apart."""

    answer: Sequence[int]
    draft: int
    x: Shaped
    u: float = 1.0
    seed: int = 0
    audit: bool = False
    state: State | None = None
    reach: Reach = Reach.ANYONE


@dataclass(frozen=True, slots=True)
class Reply:
    """What a resolver says, in the SLM's vocabulary.

    `tokens`: the token to emit, then alternatives (mode verify), with `tokens_p` their probabilities under the LLM's
    sampling distribution; empty: decide from y. `y_ids` (n,), `y_p` (n,): the
    likeliest tokens at temperature 1; what they leave of 1 is the tail. `y_draft`: the draft's probability, -1 if
    unknown. `provenance`: who says so; `origin`: the device that learned it first, if it came from another one.
    """

    tokens: Sequence[int]
    tokens_p: Sequence[float]
    y_ids: NDArray[np.intp]
    y_p: NDArray[np.float32]
    y_draft: float
    provenance: Provenance = Provenance.CLOUD
    origin: str = ""


@dataclass(slots=True, eq=False)
class Ticket:
    """A question under way; `step` is its resolver's number for it. `last`: nobody is next in line. `near`: it is with
    somebody near, and the cloud, which hears questions in their order, may yet be asked. `reply` is set once; `burst`,
    what the LLM wrote on, may grow afterwards. Times are seconds of the clock that was passed to the resolver."""

    asked_at: float
    deadline: float
    step: int = 0
    last: bool = True
    near: bool = False
    reply: Reply | None = None
    failed: bool = False
    replied_at: float = 0.0
    burst: list[int] = field(default_factory=list)
    coming: int = 0  # tokens of the burst that are still to come
    heard_at: float = 0.0  # when the reply or the last token of its burst came


@dataclass(slots=True)
class Traffic:
    """What one conversation cost: bytes on the wire to the cloud and to peers, LLM tokens computed, questions that the
    cloud was asked. `unmatched`: probability mass of y, summed over replies, that has no counterpart among the SLM's
    tokens (two tokenizers)."""

    bytes_up: int = 0
    bytes_down: int = 0
    peer_bytes_up: int = 0
    peer_bytes_down: int = 0
    llm_tokens: int = 0
    asked: int = 0
    unmatched: float = 0.0


class Conversation(ABC):
    """One answer being written, as a resolver sees it."""

    traffic: Traffic
    bursts: bool = False  # a reply may be followed by more tokens
    alone: bool = False  # nobody outside the device is ever asked

    def known(self, question: Question) -> Ticket | None:
        """An answer that needs nobody else: a ticket that has its reply."""
        return None

    @abstractmethod
    def ask(self, question: Question) -> Ticket | None:
        """None: no help to be had now (not connected, breaker open)."""

    def again(self, ticket: Ticket) -> Ticket | None:
        """A ticket that is not the last one failed, or its deadline passed: whoever is next in line is asked. None:
        no help to be had from them now."""
        return None

    def taken(self, ticket: Ticket) -> None:  # noqa: B027
        """The ticket's reply settled a token: what it teaches may be kept."""

    @abstractmethod
    def late(self, ticket: Ticket) -> None:
        """The deadline passed; whatever still comes for this ticket is dropped."""

    @abstractmethod
    def withdraw(self, ticket: Ticket) -> None:
        """The draft it was about is gone; its reply is of no use."""

    @abstractmethod
    def close(self) -> None: ...


class Resolver(ABC):
    @abstractmethod
    def open(
        self, prompt: Sequence[Message] | str, sampling: Sampling, mode: Mode, wake: Callable[[], None]
    ) -> Conversation: ...
