"""The Upstream seam: where the LLM runs. One conversation per session.

An upstream MUST:
- open a conversation without waiting for the prompt to be computed, and refuse one that can't fit (ContextFull) or
  for which there is no room now (Overloaded);
- answer each Ask for the answer so far that comes with it, whatever was asked before: it may be shorter, longer or
  quite another one;
- give log-probabilities at temperature 1 and without penalties, largest first;
- stand being cancelled at any await, after which the next `ask` works as if the cancelled call had not been;
- raise nothing but the errors of `protocol.errors`, and never put text of a prompt or an answer into one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from protocol.resolve import Answer, Ask, More, Open


class Conversation(ABC):
    """One answer being written."""

    @abstractmethod
    async def ask(self, ask: Ask, answer: list[int] | bytes) -> Answer:
        """The token after `answer`, the whole answer so far in the session's units.

        Raises RequestError if the Ask makes no sense, ContextFull, Overloaded, UpstreamError.
        """

    @abstractmethod
    async def more(self) -> More | None:
        """The token after the last Answer's (or More's) own one; None where nothing can follow."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the conversation holds. It can't be used afterwards."""


class Upstream(ABC):
    """See the module's docstring for the contract."""

    name: str  # of the LLM, as devices see it
    tokenizer: str  # its tokenizer's fingerprint, "" if unknown
    exact: bool  # mode verify is decided here, on the LLM's whole distribution
    top: int  # the most log-probabilities of an Answer

    def same_tokenizer(self, request: Open) -> bool:
        """Whether the session's units are token ids, else bytes."""
        return bool(self.tokenizer) and self.tokenizer == request.tokenizer

    @abstractmethod
    async def open(self, request: Open) -> Conversation:
        """Raises ContextFull, Overloaded, RequestError, UpstreamError."""

    @abstractmethod
    async def ready(self) -> bool:
        """Whether a conversation opened now can be expected to be answered."""

    @abstractmethod
    async def close(self) -> None:
        """Frees everything. Conversations still open fail with UpstreamError."""
