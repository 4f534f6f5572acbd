"""Request bodies of OpenAI's API, checked and turned into the agent's own Request.

A parameter that is wrong, or that asks for something the agent does not do, is a RequestError naming it. A parameter
that is not known is ignored, as newer clients send new ones; only the `skerry` object refuses unknown keys, because a
misspelt `private` must not go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from agent.adapt.shelf import AUTO
from agent.agent import Request
from protocol.errors import RequestError
from protocol.resolve import Message, Mode, Sampling

_MAX_TOP = 20  # log-probabilities per token, OpenAI's limit for chat
_SEED_MASK = (1 << 63) - 1  # OpenAI's seeds are signed 64-bit numbers

Count = Annotated[int, Meta(ge=1)]
StopText = Annotated[str, Meta(min_length=1)]
Top = Annotated[int, Meta(ge=0, le=_MAX_TOP)]

# Parameters that change the answer and are not implemented: the values that ask for nothing, and what to say.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "only one choice per request: send n requests"),
    "best_of": ((1,), "only one choice per request"),
    "echo": ((False,), "the prompt is not echoed"),
    "suffix": (("",), "text cannot be inserted before a suffix"),
    "frequency_penalty": ((0,), "not supported: use repeat_penalty"),
    "presence_penalty": ((0,), "not supported: use repeat_penalty"),
    "logit_bias": (({},), "not supported"),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is supported'),
    "tools": (([],), "tools are not supported"),
    "functions": (([],), "functions are not supported"),
    "modalities": ((["text"],), "only text is supported"),
}


class Part(msgspec.Struct):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Extension(msgspec.Struct, forbid_unknown_fields=True):
    """Skerry's own part of a request."""

    private: bool = False
    mode: Mode | None = None
    tokens: bool = False
    adapter: Annotated[str, Meta(min_length=1, max_length=64)] = AUTO


class _Body(msgspec.Struct, kw_only=True):
    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skerry: Extension | None = None


class _Chat(_Body, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None


class _Completion(_Body, kw_only=True):
    prompt: Any
    logprobs: Top | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request. `model` None: whichever is there. `tokens`: list every token in the `skerry` object."""

    request: Request
    model: str | None
    stream: bool
    include_usage: bool
    logprobs: bool
    tokens: bool


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that does not say: the length of an answer, and a fresh seed."""

    max_tokens: int
    seed: Callable[[], int]


def chat(raw: bytes, defaults: Defaults) -> Asked:
    """Body of /v1/chat/completions. Raises RequestError."""
    body = _convert(_decode(raw), _Chat)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    prompt = [message.plain() for message in body.messages]
    limit = body.max_completion_tokens or body.max_tokens
    return _asked(body, prompt, limit, defaults, logprobs=bool(body.logprobs), top=body.top_logprobs or 0)


def completion(raw: bytes, defaults: Defaults) -> Asked:
    """Body of /v1/completions. Raises RequestError."""
    body = _convert(_decode(raw), _Completion)
    prompt = body.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RequestError(
            "prompt: must be text, or a list with exactly one text; several prompts and token ids are not supported",
            "prompt",
        )
    return _asked(body, prompt, body.max_tokens, defaults, logprobs=body.logprobs is not None, top=body.logprobs or 0)


def _asked(
    body: _Body, prompt: list[Message] | str, limit: int | None, defaults: Defaults, *, logprobs: bool, top: int
) -> Asked:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    extension = body.skerry or Extension()
    request = Request(
        prompt,
        max_tokens=limit or defaults.max_tokens,
        sampling=_sampling(body, defaults),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        private=extension.private,
        top=top,
        mode=extension.mode,
        adapter=extension.adapter,
    )
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Asked(request, body.model, bool(body.stream), usage, logprobs, extension.tokens)


def _sampling(body: _Body, defaults: Defaults) -> Sampling:
    """OpenAI's default temperature is 1. It knows no top_k, so that one is llama.cpp's default."""
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(
        temperature=temperature,
        top_k=Sampling().top_k if body.top_k is None else max(0, body.top_k),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repeat_penalty or 1.0,
        seed=(defaults.seed() if body.seed is None else body.seed) & _SEED_MASK,
    )


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError("the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name, (allowed, why) in _UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise RequestError(f"{name}: {why}", name)
    return body


T = TypeVar("T", bound=_Body)


def _convert(body: dict[str, Any], schema: type[T]) -> T:
    try:
        return msgspec.convert(body, schema)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        missing = re.search(r"required field `(\w+)`", problem)
        param = ".".join(filter(None, (path.strip("`."), missing and missing[1])))
        raise RequestError(f"{param}: {problem}" if param else problem, param or None) from None
