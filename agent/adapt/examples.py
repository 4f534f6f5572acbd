"""Lessons from labelled examples: a prompt and the answer that it should get.

A file of them has one JSON object a line: `prompt` (text) or `messages` (as of the chat API), `answer`, and if wanted
`private` and `weight`. Without `private`, an example in which something personal is found is private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeAlias

import msgspec

from agent.adapt.lesson import Lesson, Source, Target, check
from agent.agent import encode
from agent.api.schema import ChatMessage
from models.chat import render
from models.engine.base import Tokenizer
from protocol.errors import ContextFull, RequestError, TrainingError
from protocol.resolve import Message

MAX_LINE = 1 << 20  # bytes
_NAMED = 20  # bad lines that an error names

Prompt: TypeAlias = Sequence[Message] | str


class _Line(msgspec.Struct, forbid_unknown_fields=True):  # a misspelt `private` must not go unnoticed
    answer: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    private: bool | None = None
    weight: float = 1.0


_decoder = msgspec.json.Decoder(_Line)


def encode_answer(tokenizer: Tokenizer, prompt: Prompt, answer: str) -> list[int]:
    """The answer's tokens and the one that ends it, as the SLM should write them. What looks like a control token in
    the answer stays text. Raises RequestError if there is nothing to write."""
    tokens = tokenizer.encode(answer)
    if not tokens:
        raise RequestError("the answer is empty")
    return [*tokens, *_end(tokenizer, prompt)]


def whole_text(prompt: Prompt, answer: str) -> str:
    """All of it, to look for personal data in, of which one part may hold the cue and the next the value."""
    if isinstance(prompt, str):
        return prompt + answer
    return "\n".join([*(message.content for message in prompt), answer])


def labelled(
    prompt: Sequence[int], answer: Sequence[int], source: Source, *, private: bool, weight: float, most: int
) -> Lesson:
    """Every token of the answer is a label. Raises ContextFull with more than `most` tokens, TrainingError."""
    length = len(prompt) + len(answer)
    if length > most:
        raise ContextFull(f"prompt and answer have {length} tokens, more than the context of {most}: shorten them")
    targets = [Target(position, "label", [token]) for position, token in enumerate(answer, len(prompt))]
    lesson = Lesson([*prompt, *answer], targets, source, private, weight)
    check(lesson)
    return lesson


def read(
    file: BinaryIO,
    tokenizer: Tokenizer,
    most: int,
    tell: Callable[[int], None],
    personal: Callable[[str], bool] = lambda text: False,
) -> Iterator[Lesson]:
    """The lessons of a file, of at most `most` tokens each. `tell` hears of the bytes of each line; `personal` says
    whether a text holds personal data. Raises TrainingError at the end, which names the bad lines and why."""
    bad: list[str] = []
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        size = len(line)
        try:
            if size > MAX_LINE:
                size += _skip_line(file) if not line.endswith(b"\n") else 0
                raise TrainingError(f"over {MAX_LINE} bytes long")
            if line.strip():
                yield _lesson(line, tokenizer, most, personal)
        except (RequestError, TrainingError) as error:
            bad.append(f"line {number}: {error}")
        tell(size)
    if bad:
        more = [f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
        raise TrainingError("\n".join(["no lesson was kept, since these lines are no examples:", *bad[:_NAMED], *more]))


def _lesson(line: bytes, tokenizer: Tokenizer, most: int, personal: Callable[[str], bool]) -> Lesson:
    """Raises RequestError, TrainingError."""
    try:
        given = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrainingError(str(error)) from None
    if (given.prompt is None) == (given.messages is None):
        raise TrainingError("give either `prompt` or `messages`")
    if given.messages == []:
        raise TrainingError("`messages` is empty")
    prompt: Prompt = given.prompt or ""
    if given.messages is not None:
        prompt = [message.plain() for message in given.messages]
    fed, answer = encode(tokenizer, prompt), encode_answer(tokenizer, prompt, given.answer)
    private = personal(whole_text(prompt, given.answer)) if given.private is None else given.private
    return labelled(fed, answer, "example", private=private, weight=given.weight, most=most)


def _skip_line(file: BinaryIO) -> int:
    """Reads on to the end of the line. Returns its bytes."""
    skipped = 0
    while part := file.readline(MAX_LINE):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _end(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The token that ends an answer: what the chat template writes after one, else the model's own."""
    if not isinstance(prompt, str):
        mark = "\ue000"
        try:
            _, found, rest = render(tokenizer, [*prompt, Message("assistant", mark)]).rpartition(mark)
        except RequestError:  # a template may refuse a conversation that ends so
            found = rest = ""
        after = tokenizer.encode(rest.lstrip(), special=True)[:1] if found else []
        if after and after[0] in tokenizer.eog:
            return after
    return [tokenizer.end_id] if tokenizer.end_id >= 0 else []
