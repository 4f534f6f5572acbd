"""Messages to a prompt, by the chat template of the model file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import jinja2

from models.engine.base import Tokenizer
from models.template import STEPS, make_environment, steps
from protocol.errors import RequestError
from protocol.resolve import Message

_PLACEHOLDER = "\ue000{}\ue001"  # private-use characters around the message's index
_MESSAGE, _LETTER = 1_000, 32  # steps of the template's budget, for each message and for each letter of it
_LONGEST = 1 << 16  # characters of a template; the longest in use have some 20,000
_PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The prompt's token ids. Only the template speaks control tokens: `<|im_end|>` in a message stays text.

    Raises what `render` raises.
    """
    if not any(_speaks_control(tokenizer, message.content) for message in messages):
        text = render(tokenizer, messages)
        return tokenizer.encode(text, start=not text.startswith(tokenizer.begin), special=True)
    # The template gets placeholders, and the contents are put in as plain text afterwards.
    held = [Message(message.role, _PLACEHOLDER.format(at)) for at, message in enumerate(messages)]
    text = render(tokenizer, held)
    parts = _PLACEHOLDERS.split(text)  # template, index, template, index, …
    tokens = tokenizer.encode(parts[0], start=not text.startswith(tokenizer.begin), special=True)
    for index, template in zip(parts[1::2], parts[2::2], strict=True):
        tokens += tokenizer.encode(messages[int(index)].content)
        tokens += tokenizer.encode(template, special=True)
    return tokens


def _speaks_control(tokenizer: Tokenizer, content: str) -> bool:
    return any(control in content for control in tokenizer.controls)


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The prompt up to where the assistant's answer begins.

    The template comes out of a model file, so it runs sandboxed and on a budget. Raises RequestError if the model has
    none, if the template refuses the messages, fails or makes too much of them.
    """
    if not tokenizer.template:
        raise RequestError("the model has no chat template: use /v1/completions", "messages")

    def refuse(message: str) -> str:
        raise RequestError(f"the model's chat template refuses the messages: {message}", "messages")

    try:
        template = _compiled(tokenizer.template)
        with steps(STEPS + sum(_MESSAGE + _LETTER * len(message.content) for message in messages)):
            return template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
                bos_token=tokenizer.begin,
                eos_token=tokenizer.end,
                raise_exception=refuse,
            )
    except RequestError:
        raise
    except Exception as error:  # code from a model's file: it may fail in any way that there is
        raise RequestError(f"the model's chat template fails on the messages: {error}", "messages") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > _LONGEST:
        raise RequestError(f"the model's chat template is longer than {_LONGEST:,} characters", "messages")
    with steps(STEPS):
        return make_environment().from_string(template)
