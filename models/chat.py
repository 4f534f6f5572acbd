"""Messages to prompt text, by the chat template of the model file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.engine.base import Tokenizer
from protocol.errors import RequestError
from protocol.resolve import Message


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The prompt up to where the assistant's answer begins.

    The template comes out of a model file, so it runs sandboxed. Raises RequestError if the model has none or the
    template refuses the messages.
    """
    if not tokenizer.template:
        raise RequestError("the model has no chat template: use /v1/completions", "messages")

    def refuse(message: str) -> str:
        raise RequestError(f"the model's chat template refuses the messages: {message}", "messages")

    try:
        return _compiled(tokenizer.template).render(
            messages=[{"role": message.role, "content": message.content} for message in messages],
            add_generation_prompt=True,
            bos_token=tokenizer.begin,
            eos_token=tokenizer.end,
            raise_exception=refuse,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise RequestError(f"the model's chat template fails on the messages: {error}", "messages") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    return environment.from_string(template)
