"""POST /v1/feedback: what its reader thinks of an answer becomes a lesson, or takes one back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.adapt.collect import Collector
from agent.adapt.examples import Prompt, encode_answer, labelled, whole_text
from agent.adapt.lesson import Lesson
from agent.agent import Agent
from agent.api.schema import ChatMessage
from protocol.errors import ContextFull, RequestError

CORRECTED = 4.0  # weight of what a user wrote, against what the LLM said
GOOD = 0.5  # of an answer that will be written again as it is

_OF_READER = "/reader"  # behind an answer's id: the lesson of its reader, beside that of the LLM


class _Body(msgspec.Struct, forbid_unknown_fields=True):  # a misspelt `private` must not go unnoticed
    id: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    correction: Annotated[str, Meta(min_length=1)] | None = None
    rating: Literal["good", "bad"] | None = None
    private: bool | None = None  # None: if something personal is in it


_decoder = msgspec.json.Decoder(_Body)


class Taken(msgspec.Struct, frozen=True):
    """What came of it: lessons that were made, and lessons that went."""

    lessons: int
    dropped: int
    object: str = "feedback"


@dataclass(frozen=True, slots=True)
class Feedback:
    """`take` waits for the disk, and tokenizes, so it is not for the event loop."""

    agent: Agent
    collector: Collector

    def take(self, raw: bytes) -> Taken:
        """Raises RequestError, ContextFull, UnknownAnswer, StoreError."""
        body = _checked(raw)
        with self.agent.using_model():
            return self._of_answer(body, body.id) if body.id is not None else self._of_text(body)

    def _of_text(self, body: _Body) -> Taken:
        prompt: Prompt = body.prompt or ""
        if body.messages is not None:
            prompt = [message.plain() for message in body.messages]
        fed = self.agent.encode(prompt)
        answer = encode_answer(self.agent.engine.tokenizer, prompt, body.correction or "")
        private = self._private(body, prompt)
        self.collector.lessons.add(self._lesson(fed, answer, CORRECTED, private=private))
        return Taken(1, 0)

    def _of_answer(self, body: _Body, shown: str) -> Taken:
        id = shown.rpartition("-")[2]  # clients see it behind a prefix
        answer, lessons = self.collector.answer(id), self.collector.lessons
        private = answer.private or self._private(body, answer.asked)
        match body.rating:
            case "bad":
                return Taken(0, lessons.drop(id) + lessons.drop(id + _OF_READER))
            case "good":
                lesson = self._lesson(answer.prompt, answer.tokens, GOOD, private=private)
                lessons.add(lesson, id + _OF_READER)
                return Taken(1, 0)
            case None:
                right = encode_answer(self.agent.engine.tokenizer, answer.asked, body.correction or "")
                lessons.add(self._lesson(answer.prompt, right, CORRECTED, private=private), id + _OF_READER)
                return Taken(1, lessons.drop(id))

    def _private(self, body: _Body, prompt: Prompt) -> bool:
        if body.private is not None or self.agent.privacy is None:
            return bool(body.private)
        return bool(self.agent.privacy.detector.spans(whole_text(prompt, body.correction or "")))

    def _lesson(self, prompt: Sequence[int], answer: Sequence[int], weight: float, *, private: bool) -> Lesson:
        context = self.agent.engine.info.context
        try:
            return labelled(prompt, answer, "correction", private=private, weight=weight, most=context)
        except ContextFull as error:
            error.param = "correction"
            raise


def _checked(raw: bytes) -> _Body:
    """Raises RequestError."""
    try:
        body = _decoder.decode(raw)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise RequestError(problem, path.strip("`") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError("the body is not valid JSON") from None
    if sum(given is not None for given in (body.id, body.prompt, body.messages)) != 1:
        raise RequestError("give exactly one of id, messages and prompt", "id")
    if (body.correction is None) == (body.rating is None):
        raise RequestError("give either a correction or a rating", "correction")
    if body.rating is not None and body.id is None:
        raise RequestError("a rating needs the id of the answer that it is about", "id")
    return body
