"""Which upstream a configuration names. A new one is a module and a line in `_KINDS`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from models.engine.open import EngineOptions, open_engine, open_tokenizer
from protocol.errors import ConfigError
from server.cloud.config import ServeConfig
from server.cloud.embedded import EmbeddedUpstream
from server.cloud.openai import OpenAiUpstream
from server.cloud.upstream import Upstream

_MAX_SEQUENCES = 256  # llama.cpp's own limit


async def open_upstream(config: ServeConfig, resolve: Callable[[str], Path]) -> Upstream:
    """`resolve` finds the model of a catalog id or path. Raises ConfigError and what `resolve` raises."""
    return await _KINDS[config.upstream.kind](config, resolve)


async def _embedded(config: ServeConfig, resolve: Callable[[str], Path]) -> Upstream:
    section, limits = config.upstream, config.limits
    if limits.sessions > _MAX_SEQUENCES:
        raise ConfigError(
            f"limits.sessions = {limits.sessions} is not allowed with upstream.kind = 'embedded'; allowed: "
            f"integer 1 to {_MAX_SEQUENCES}"
        )
    path = await asyncio.to_thread(resolve, section.model)
    options = EngineOptions(context=section.context, sequences=limits.sessions, threads=section.threads, hidden=False)
    engine = await asyncio.to_thread(open_engine, path, options)
    room = {"prompt_tokens": limits.prompt_tokens, "answer_tokens": limits.answer_tokens}
    return await asyncio.to_thread(EmbeddedUpstream, engine, **room)


async def _openai(config: ServeConfig, resolve: Callable[[str], Path]) -> Upstream:
    section = config.upstream
    if not section.url.startswith(("http://", "https://")):
        raise ConfigError(
            f"upstream.url = {section.url!r} is not allowed with upstream.kind = 'openai'; allowed: the base address "
            "of an OpenAI-compatible API, such as http://127.0.0.1:8080/v1"
        )
    if section.tokenizer and section.endpoint == "chat":
        raise ConfigError("upstream.tokenizer is of no use with upstream.endpoint = 'chat': leave one of them out")
    tokenizer = None
    if section.tokenizer:
        path = await asyncio.to_thread(resolve, section.tokenizer)
        tokenizer = await asyncio.to_thread(open_tokenizer, path)
        await asyncio.to_thread(lambda: tokenizer.fingerprint)  # read once, and not in the event loop
    return OpenAiUpstream(section, tokenizer, prompt_tokens=config.limits.prompt_tokens)


_KINDS: dict[str, Callable[[ServeConfig, Callable[[str], Path]], Awaitable[Upstream]]] = {
    "embedded": _embedded,
    "openai": _openai,
}
