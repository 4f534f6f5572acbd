"""One request's guard: what of it others may read, and when they may be asked at all.

prompt ──► detector ──► free      others read it as it is
                   ├──► redacted  they read placeholders; peers are not asked, and nothing is shared
                   └──► local     nobody is asked
answer so far + draft ──► the same, with each question: what is asked carries the answer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Literal

from agent.privacy.detect import FEW, Detector
from agent.privacy.redact import Redaction, Restoring
from agent.privacy.span import Kind, Span
from agent.resolver import Conversation, Question, Reach, Resolver, Ticket
from models.engine.base import Tokenizer
from protocol.resolve import Message, Mode, Sampling

_WINDOW = 600  # characters of an answer that are looked at anew with each question; what is before them is settled
_CONTEXT = 200  # characters before the window that its rules may look back at


class Outcome(StrEnum):
    FREE = "free"
    REDACTED = "redacted"
    LOCAL = "local"


class Privacy:
    """What the device does about personal data in requests. `handling`: `redact` or `local`."""

    def __init__(self, handling: Literal["redact", "local"], regions: Sequence[str]) -> None:
        self.handling = handling
        self.detector = Detector(regions)

    def guard(self, prompt: Sequence[Message] | str, tokenizer: Tokenizer) -> Guard:
        """Reads the whole prompt, some milliseconds per kilobyte: not on the engine's thread."""
        return Guard(self, prompt, tokenizer)


class Guard:
    """After it was made, used on the engine's thread. `prompt`: as others may read it. `private`: something was found,
    in the prompt or in what was written since."""

    def __init__(self, privacy: Privacy, prompt: Sequence[Message] | str, tokenizer: Tokenizer) -> None:
        self._privacy = privacy
        self._tokenizer = tokenizer
        texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        self._redaction = Redaction(texts)
        self.restoring = Restoring(self._redaction)
        # Values are learned from all texts before any is redacted: what one tells, another may repeat without its cue.
        detected = [self._detected(text, ends=isinstance(prompt, str)) for text in texts]
        for text, spans in zip(texts, detected, strict=True):
            for span in spans:
                self._redaction.add(text[span.start : span.end], span.kind)
        hidden = [self._redaction.redact(text, spans) for text, spans in zip(texts, detected, strict=True)]
        self.prompt: Sequence[Message] | str = (
            hidden[0]
            if isinstance(prompt, str)
            else [Message(message.role, text) for message, text in zip(prompt, hidden, strict=True)]
        )
        self.private = bool(self._redaction.values)
        # Text that is continued may hold the cue for what the answer begins with.
        self._before = prompt[-_CONTEXT:] if isinstance(prompt, str) else ""
        self._settled = self._before
        self._found: list[tuple[Span, str]] = []  # in what is settled

    @property
    def outcome(self) -> Outcome:
        if not self.private:
            return Outcome.FREE
        return Outcome.LOCAL if self._privacy.handling == "local" else Outcome.REDACTED

    def open(self, resolver: Resolver, sampling: Sampling, mode: Mode, wake: Callable[[], None]) -> GuardedConversation:
        return GuardedConversation(resolver.open(self.prompt, sampling, mode, wake), self, mode)

    def mode(self, mode: Mode) -> Mode:
        """The mode of an answer. To verify is to tell the SLM's distribution, which is made from the real text; and the
        LLM's own, which it would follow, is that of another prompt. So a redacted answer fuses."""
        return "fuse" if mode == "verify" and self.outcome is Outcome.REDACTED else mode

    def screened(self, question: Question, mode: Mode) -> Question:
        """The question as others may hear it, and who may."""
        text = self._text(question.answer)
        drafted = self._text([*question.answer, question.draft])
        if self._unsettled(text) or self._unsettled(drafted):
            return replace(question, reach=Reach.NOBODY)
        spans = self._spans(drafted, len(text))
        if spans is not None and not self.private:
            return question
        if spans is None or self.outcome is Outcome.LOCAL or mode == "verify":
            return replace(question, reach=Reach.NOBODY)
        return replace(question, answer=self._told(question.answer, text, spans), reach=Reach.CLOUD)

    def finish(self, tokens: Sequence[int]) -> None:
        """Reads the answer's end, about which no question may have been asked."""
        text = self._text(tokens)
        self._spans(text, len(text) + 1)

    def _detected(self, text: str, *, ends: bool) -> list[Span]:
        """`ends`: the text is going to be continued, so that its end may be the beginning of a number."""
        detector = self._privacy.detector
        spans = detector.spans(text)
        begin = detector.unsettled(text) if ends else None
        if begin is not None and sum(map(str.isdigit, text[begin:])) >= FEW:
            spans.append(Span(begin, len(text), Kind.ID, 0.5))
        return spans

    def _text(self, tokens: Sequence[int]) -> str:
        """With what it continues. Bytes that are no character stay countable; half a character at the end is left
        out."""
        raw = self._tokenizer.decode(tokens)
        text = raw.decode("utf-8", "surrogateescape")
        return self._before + text.rstrip("".join(map(chr, range(0xDC80, 0xDD00)))) if text else self._before

    def _unsettled(self, text: str) -> bool:
        few = 1 if self.private else FEW
        if len(text) == len(self._before):
            return False  # nothing of the answer is there; the prompt's own end is redacted already
        return self._privacy.detector.unsettled(text, few) is not None or self._redaction.beginning(text) is not None

    def _spans(self, text: str, end: int) -> list[tuple[Span, str]] | None:
        """All that is to be hidden in the answer so far; None if something reaches to `end` and may not be whole."""
        if not text.startswith(self._settled):  # drafts behind which the settled part had moved are gone
            self._settled, self._found = self._before, []
        at = len(self._settled)
        start = max(0, at - _CONTEXT)
        window = text[start:]
        detected = [span for span in self._privacy.detector.spans(window) if start + span.end > at]
        whole = [span for span in detected if start + span.end < end]
        self.private = self.private or any(start + span.end > len(self._before) for span in whole)
        known = [(span.moved(start), told) for span, told in self._redaction.spans(window, whole)]
        found = self._found + [(span, told) for span, told in known if span.end > at]
        if len(text) - at > _WINDOW:
            self._settle(text, found)
        return None if len(whole) < len(detected) or any(span.end >= end for span, _ in found) else found

    def _settle(self, text: str, found: list[tuple[Span, str]]) -> None:
        """Moves the window on, to a space that is in no span."""
        cut = text.rfind(" ", 0, len(text) - _WINDOW // 2)
        if cut > len(self._settled) and not any(span.start < cut < span.end for span, _ in found):
            self._settled, self._found = text[:cut], [one for one in found if one[0].end <= cut]

    def _told(self, tokens: Sequence[int], text: str, spans: Sequence[tuple[Span, str]]) -> list[int]:
        """The answer's tokens with those of each span replaced by its placeholder's. Tokens outside stay the same, so
        that an answer that grows only ever grows for others, too."""
        ahead = len(self._before)
        places = [
            (len(_raw(text[ahead : max(ahead, span.start)])), len(_raw(text[ahead : span.end])), placeholder)
            for span, placeholder in spans
            if span.end > ahead
        ]
        told: list[int] = []
        changed, at = b"", 0  # bytes that have no token yet; bytes read
        for token in tokens:
            piece = self._tokenizer.piece(token)
            end = at + len(piece)
            inside = [place for place in places if place[0] < end and at < place[1]]
            if inside:
                read = at
                for first, last, placeholder in inside:
                    if first >= at:
                        changed += piece[read - at : first - at] + placeholder.encode()
                    read = min(last, end)
                changed += piece[read - at :]
            else:
                told += self._tokenizer.encode(changed) if changed else []
                told.append(token)
                changed = b""
            at = end
        return told + (self._tokenizer.encode(changed) if changed else [])


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class GuardedConversation(Conversation):
    """A conversation whose questions the guard has read first."""

    def __init__(self, inner: Conversation, guard: Guard, mode: Mode) -> None:
        self.traffic, self.bursts, self.alone = inner.traffic, inner.bursts, inner.alone
        self._inner = inner
        self._guard = guard
        self._mode = mode
        self._screened: tuple[Question, Question] | None = None  # the latest one, as it came and as it may be heard

    def known(self, question: Question) -> Ticket | None:
        return self._inner.known(self._heard(question))

    def ask(self, question: Question) -> Ticket | None:
        heard = self._heard(question)
        return None if heard.reach is Reach.NOBODY else self._inner.ask(heard)

    def _heard(self, question: Question) -> Question:
        if self._screened is None or self._screened[0] is not question:
            heard = question if self.alone else self._guard.screened(question, self._mode)
            self._screened = (question, heard)
        return self._screened[1]

    def again(self, ticket: Ticket) -> Ticket | None:
        return self._inner.again(ticket)

    def taken(self, ticket: Ticket) -> None:
        self._inner.taken(ticket)

    def late(self, ticket: Ticket) -> None:
        self._inner.late(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        self._inner.withdraw(ticket)

    def close(self) -> None:
        self._inner.close()
