"""One session: takes the Asks of an answer in order, and sends Answers and bursts."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from protocol.errors import ContextFull, LinkError, Overloaded, RequestError, SkerryError
from protocol.resolve import Ask, FromCloud, Open, Refused
from server.cloud.metrics import Metrics
from server.cloud.upstream import Conversation, Upstream

log = logging.getLogger(__name__)

PENDING = 64  # Asks of one session that may wait
MAX_BURST = 64  # tokens
MAX_ANSWER = 65_536  # units
_RETRY_S = 1.0  # after a failure of the LLM


Units: TypeAlias = list[int] | bytes


@dataclass(slots=True)
class _Pending:
    ask: Ask
    answer: Units  # the whole answer so far, this Ask's units included
    arrived: float
    answered: bool = False


class Session:
    """Runs until `close`, or until it fails as a whole; `ended` is called when it has. `clock` is in seconds.

    Units count as sent when they arrive, whatever becomes of their Ask, so both sides always mean the same by `keep`.
    An Ask that a later one takes back, because that keeps less than the Ask was about, is dropped without an Answer.
    """

    def __init__(
        self,
        request: Open,
        upstream: Upstream,
        metrics: Metrics,
        send: Callable[[FromCloud], Awaitable[None]],
        ended: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.active = clock()  # when something was last heard or said
        self._request = request
        self._upstream = upstream
        self._metrics = metrics
        self._send = send
        self._clock = clock
        self._same = upstream.same_tokenizer(request)
        self._answer: Units = [] if self._same else b""
        self._pending: deque[_Pending] = deque()
        self._arrival = asyncio.Event()
        self._current: _Pending | None = None
        self._work: asyncio.Task[None] | None = None  # on the current Ask: its Answer, then its burst
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: ended())

    def push(self, ask: Ask, refusal: SkerryError | None = None) -> None:
        """Notes what an Ask says of the answer and, unless it is refused anyway, has it answered.

        Raises RequestError if it does not fit the answer so far, ContextFull if that gets too long, else `refusal`,
        else Overloaded.
        """
        self.active = self._clock()
        self._answer = self._extended(ask)
        for pending in [pending for pending in self._pending if len(pending.answer) > ask.keep]:
            self._pending.remove(pending)
        current = self._current
        if self._work is not None and current and (current.answered or len(current.answer) > ask.keep):
            self._work.cancel()
        if refusal is not None:
            raise refusal
        if len(self._pending) >= PENDING:
            raise Overloaded("too many steps of this session are waiting")
        self._pending.append(_Pending(ask, self._answer, self.active))
        self._arrival.set()

    def close(self) -> None:
        self._task.cancel()

    def _extended(self, ask: Ask) -> Units:
        if not 0 <= ask.keep <= len(self._answer):
            raise RequestError(f"keep = {ask.keep} is outside the answer so far", "keep")
        if ask.text if self._same else ask.tokens:
            raise RequestError("the Ask is not in the session's units: compare Hello.tokenizer", "tokens")
        if ask.keep + len(ask.text) + len(ask.tokens) > MAX_ANSWER:
            raise ContextFull(f"an answer may have {MAX_ANSWER} units")
        if isinstance(self._answer, bytes):
            return self._answer[: ask.keep] + ask.text
        return self._answer[: ask.keep] + ask.tokens

    async def _run(self) -> None:
        opening = asyncio.create_task(self._upstream.open(self._request))
        try:
            conversation = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_late)
            raise
        except Exception as error:
            await self._refuse(error, -1)
            return
        try:
            while True:
                await self._serve(conversation)
        finally:
            conversation.close()

    async def _serve(self, conversation: Conversation) -> None:
        """Answers the next Ask."""
        while not self._pending:
            self._arrival.clear()
            await self._arrival.wait()
        self._current = self._pending.popleft()
        self._work = asyncio.create_task(self._help(conversation, self._current))
        try:
            await asyncio.wait([self._work])
        finally:
            self._work.cancel()
            self._work.add_done_callback(_report)
            self._current = self._work = None

    async def _help(self, conversation: Conversation, pending: _Pending) -> None:
        ask = pending.ask
        self._metrics.asks.labels(self._request.mode).inc()
        try:
            reply = await conversation.ask(ask, pending.answer)
        except Exception as error:
            await self._refuse(error, ask.step)
            return
        await self._send(reply)
        pending.answered = True
        self.active = self._clock()
        self._metrics.llm_tokens.inc(reply.llm_tokens)
        self._metrics.answer_seconds.observe(self.active - pending.arrived)
        if not self._pending and self._bursts():
            await self._extend(conversation)

    def _bursts(self) -> bool:
        """Only what was decided here can be followed."""
        decided = self._request.mode == "verify" and self._upstream.exact and self._same
        return self._request.mode == "take" or decided

    async def _extend(self, conversation: Conversation) -> None:
        """Sends the burst. The next Ask cancels it."""
        with suppress(SkerryError):  # what a burst meets, the next Ask meets too and reports
            for _ in range(min(self._request.burst, MAX_BURST)):
                more = await conversation.more()
                if more is None:
                    return
                await self._send(more)
                self._metrics.burst_tokens.inc()
                self._metrics.llm_tokens.inc()

    async def _refuse(self, error: Exception, step: int) -> None:
        if not isinstance(error, SkerryError):
            log.error("a step failed: %s", type(error).__name__)
        await self._send(refused(error, self._request.session, step))


def refused(error: Exception, session: int, step: int) -> Refused:
    """What a device is told about `error`."""
    match error:
        case Overloaded():
            return Refused(session, step, "overloaded", str(error), error.retry_after)
        case ContextFull():
            return Refused(session, step, "context_full", str(error))
        case RequestError():
            return Refused(session, step, "bad_request", str(error))
        case LinkError():
            return Refused(session, step, "upstream", str(error), _RETRY_S)
        case _:
            return Refused(session, step, "upstream", "the LLM failed", _RETRY_S)


def _report(work: asyncio.Task[None]) -> None:
    if not work.cancelled() and (error := work.exception()):
        log.error("a step failed: %s", type(error).__name__)


def _close_late(opening: asyncio.Task[Conversation]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
