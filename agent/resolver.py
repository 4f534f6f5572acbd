"""The Resolver seam: somebody who may answer an escalation.

A resolver never blocks. It hands out a Ticket, fills it from whatever thread it likes, and calls `wake`; the token
loop goes on drafting and looks at the ticket when it comes round.
"""

from __future__ import annotations

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
class Question:
    """One step that is to be resolved. `answer`: the tokens before it, prompt not counted, unsettled drafts
    included. `x`: the SLM's sampling distribution."""

    answer: Sequence[int]
    draft: int
    x: Shaped


@dataclass(frozen=True, slots=True)
class Reply:
    """What a resolver says, in the SLM's vocabulary.

    `tokens`: the token to emit, then alternatives (mode verify), with `tokens_p` their probabilities under the LLM's
    sampling distribution; empty: decide from y. `y_ids` (n,), `y_p` (n,): the
    likeliest tokens at temperature 1; what they leave of 1 is the tail. `y_draft`: the draft's probability, -1 if
    unknown. `provenance`: who says so.
    """

    tokens: Sequence[int]
    tokens_p: Sequence[float]
    y_ids: NDArray[np.intp]
    y_p: NDArray[np.float32]
    y_draft: float
    provenance: Provenance = Provenance.CLOUD


@dataclass(slots=True, eq=False)
class Ticket:
    """A question under way; `step` is its resolver's number for it. `reply` is set once; `burst`, what the
    LLM wrote on, may grow afterwards. Times are seconds of the clock that was passed to the resolver."""

    asked_at: float
    deadline: float
    step: int = 0
    reply: Reply | None = None
    failed: bool = False
    replied_at: float = 0.0
    burst: list[int] = field(default_factory=list)
    coming: int = 0  # tokens of the burst that are still to come
    heard_at: float = 0.0  # when the reply or the last token of its burst came


@dataclass(slots=True)
class Traffic:
    """What one conversation cost: bytes on the wire, LLM tokens computed, questions asked. `unmatched`: probability
    mass of y, summed over replies, that has no counterpart among the SLM's tokens (two tokenizers)."""

    bytes_up: int = 0
    bytes_down: int = 0
    llm_tokens: int = 0
    asked: int = 0
    unmatched: float = 0.0


class Conversation(ABC):
    """One answer being written, as a resolver sees it."""

    traffic: Traffic
    bursts: bool = False  # a reply may be followed by more tokens

    @abstractmethod
    def ask(self, question: Question) -> Ticket | None:
        """None: no help to be had now (not connected, breaker open)."""

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
