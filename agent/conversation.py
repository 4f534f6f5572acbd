"""One answer as the cloud resolver sees it: what was sent so far, and what comes back in the SLM's own tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from agent import mapping
from agent.combine import offer
from agent.resolver import Conversation, Question, Reply, Ticket, Traffic
from models.engine.base import common_prefix
from protocol import resolve as wire
from protocol.errors import ProtocolError
from protocol.resolve import Message, Mode, Sampling

if TYPE_CHECKING:
    from agent.cloud import CloudResolver, Link


class CloudConversation(Conversation):
    """Opened on the present link, if there is one, else with the first question; opened anew if the link was lost."""

    def __init__(
        self,
        resolver: CloudResolver,
        session: int,
        prompt: Sequence[Message] | str,
        sampling: Sampling,
        mode: Mode,
        wake: Callable[[], None],
    ) -> None:
        self.traffic = Traffic()
        self.wake = wake
        self._resolver = resolver
        self._session = session
        self._prompt = prompt
        self._sampling = sampling
        self._mode = mode
        self._steps = count(1)
        self._link: Link | None = None  # the link this session is open on
        self._sent: Sequence[int] = ()  # the answer's units as the other side has them: token ids or bytes
        self._shut_until = 0.0
        self._burst = 0 if mode == "fuse" else resolver.options.burst  # a burst's tokens come without y
        self.bursts = self._burst > 0
        self._late: set[int] = set()  # steps whose deadline passed
        self._continuations: dict[Ticket, bytes] = {}  # what the LLM wrote, where it speaks bytes
        # The cloud is told the prompt at once, so that it is read by the time of the first question.
        link = resolver.link
        if link is not None and resolver.breaker.state == "closed":
            self._open_on(link)

    def ask(self, question: Question) -> Ticket | None:
        link, breaker, now = self._resolver.link, self._resolver.breaker, self._resolver.clock()
        if link is None or now < self._shut_until:
            return None
        same = link.hello.tokenizer == self._resolver.fingerprint
        units = question.answer if same else self._resolver.tokenizer.decode(question.answer)
        if not same and _cut_off(bytes(units)):
            return None  # half a character means nothing to another tokenizer
        if not breaker.allows():
            return None
        if self._link is not link:
            self._open_on(link)
        keep = common_prefix(self._sent, units)
        step = next(self._steps)
        ticket = Ticket(asked_at=now, deadline=now + self._resolver.options.deadline, step=step)
        link.open_questions[self._session, step] = (self, ticket)
        if same:
            ask = self._ask_tokens(step, keep, question)
        else:
            draft = self._resolver.tokenizer.piece(question.draft)
            ask = wire.Ask(self._session, step, keep, text=bytes(units[keep:]), draft_text=draft)
        self._sent = units
        self.traffic.asked += 1
        self._send(link, ask)
        return ticket

    def _ask_tokens(self, step: int, keep: int, question: Question) -> wire.Ask:
        new = list(question.answer[keep:])
        if self._mode != "verify":
            return wire.Ask(self._session, step, keep, new, question.draft)
        ids, p, tail = offer(question.x, question.draft)
        return wire.Ask(self._session, step, keep, new, question.draft, wire.pack_ids(ids), wire.pack_floats(p), tail)

    def _open_on(self, link: Link) -> None:
        options, sampling = self._resolver.options, self._sampling
        # To fuse, or to verify without the LLM's whole distribution, y has to reach as far as top_k does.
        top = options.top if self._mode == "take" else max(options.top, sampling.top_k)
        prompt = self._prompt if isinstance(self._prompt, str) else list(self._prompt)
        self._link, self._sent = link, ()
        link.sessions[self._session] = self
        self._send(
            link,
            wire.Open(
                session=self._session,
                prompt=prompt,
                tokenizer=self._resolver.fingerprint,
                sampling=sampling,
                mode=self._mode,
                top=min(top, link.hello.top),
                burst=self._burst,
            ),
        )

    def _send(self, link: Link, message: wire.FromDevice) -> None:
        frame = wire.encode(message)
        self.traffic.bytes_up += wire.wire_size(len(frame), masked=True)
        link.send(frame)

    def late(self, ticket: Ticket) -> None:
        self._forget(ticket)
        self._late.add(ticket.step)
        self.traffic.llm_tokens += 1  # computed all the same, as far as this side can tell
        self._resolver.breaker.failure()

    def withdraw(self, ticket: Ticket) -> None:
        self._forget(ticket)
        self._resolver.breaker.abandoned()  # its answer will not be heard, should it be the trial

    def _forget(self, ticket: Ticket) -> None:
        if self._link:
            self._link.open_questions.pop((self._session, ticket.step), None)

    def close(self) -> None:
        link = self._link
        if link is None:
            return
        link.sessions.pop(self._session, None)
        link.bursts.pop(self._session, None)
        left = [key for key in list(link.open_questions) if key[0] == self._session]
        for key in left:
            link.open_questions.pop(key, None)
        if left:
            self.traffic.llm_tokens += len(left)
            self._resolver.breaker.abandoned()
        if link is self._resolver.link:
            self._send(link, wire.Close(self._session))
        self._link = None

    # The event loop's side.

    def fill(self, ticket: Ticket, answer: wire.Answer, hello: wire.Hello) -> None:
        """Puts the answer, in the SLM's tokens, into its ticket. Raises ProtocolError."""
        self.traffic.llm_tokens += max(0, answer.llm_tokens)
        same = hello.tokenizer == self._resolver.fingerprint
        ticket.replied_at = ticket.heard_at = self._resolver.clock()
        ticket.coming = self._burst if answer.tokens or answer.text else 0
        ticket.reply = self._reply(answer) if same else self._mapped(ticket, answer)
        self.wake()

    def _reply(self, answer: wire.Answer) -> Reply:
        vocab = self._resolver.tokenizer.vocab
        ids = wire.unpack_ids(answer.y_ids).astype(np.intp)
        p = np.exp(wire.unpack_floats(answer.y_logp))
        tokens_p = wire.unpack_floats(answer.tokens_p).tolist() or [0.0] * len(answer.tokens)
        sound = (
            len(ids) == len(p)
            and len(tokens_p) == len(answer.tokens)
            and all(0 <= token < vocab for token in (*answer.tokens, *ids.tolist()))
            and bool(np.isfinite(p).all())
            and float(p.sum()) < 1.01
            and (answer.tokens or len(ids))
        )
        if not sound:
            raise ProtocolError("an answer whose tokens or probabilities are out of range")
        return Reply(answer.tokens, tokens_p, ids, p, answer.y_draft)

    def _mapped(self, ticket: Ticket, answer: wire.Answer) -> Reply:
        tokenizer = self._resolver.tokenizer
        p = np.exp(wire.unpack_floats(answer.y_logp))
        if len(p) != len(answer.y_pieces) or not np.isfinite(p).all() or float(p.sum()) > 1.01:
            raise ProtocolError("an answer whose pieces and probabilities do not fit")
        ids, mapped, unmatched = mapping.distribution(tokenizer, answer.y_pieces, p)
        first = mapping.first_token(tokenizer, answer.text)
        decided = self._mode == "take" and first is not None
        self._continuations[ticket] = answer.text
        if not decided and not len(ids):
            raise ProtocolError("an answer that says nothing")
        tokens = [first] if decided and first is not None else []
        tokens_p = [float(mapped[ids == token].sum()) for token in tokens]
        self.traffic.unmatched += unmatched
        return Reply(tokens, tokens_p, ids, mapped, answer.y_draft)

    def extend(self, ticket: Ticket, more: wire.More) -> None:
        """One more token of a burst."""
        self.traffic.llm_tokens += 1
        ended = more.token < 0 and not more.text
        ticket.heard_at = self._resolver.clock()
        ticket.coming = 0 if ended else max(0, ticket.coming - 1)
        if ticket in self._continuations:
            text = self._continuations[ticket] = self._continuations[ticket] + more.text
            ticket.burst[:] = mapping.continuation(self._resolver.tokenizer, text, ended=ended)[1:]
        elif 0 <= more.token < self._resolver.tokenizer.vocab:
            ticket.burst.append(more.token)
        self.wake()

    def note_unwanted(self, answer: wire.Answer) -> bool:
        """A reply that nobody waits for any more: paid for, never used. True if it is late, False if the question was
        withdrawn."""
        late = answer.step in self._late
        self.traffic.llm_tokens += max(0, answer.llm_tokens - late)
        return late

    def refused(self, message: wire.Refused) -> None:
        if message.step < 0 or message.code == "unknown_session":
            link, self._link = self._link, None
            if link:
                link.sessions.pop(self._session, None)  # the next question opens the session again
        if message.retry_after > 0.0:
            self._shut_until = self._resolver.clock() + message.retry_after
        elif message.step < 0 or message.code == "context_full":
            self._shut_until = float("inf")


def _cut_off(text: bytes) -> bool:
    """Does the text end within a UTF-8 character?"""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text[-4:])
    return bool(decoder.getstate()[0])
