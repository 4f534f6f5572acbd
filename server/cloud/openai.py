"""The LLM behind any OpenAI-compatible server that returns log-probabilities: vLLM, llama-server, a hosted model.

Only its likeliest tokens are known, so nothing is exact: in the modes verify and fuse the device decides from them.
A repetition penalty is not applied here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import numpy as np

from models.engine.base import Tokenizer
from models.sampling import shape, uniform
from protocol.errors import RequestError, UpstreamError
from protocol.resolve import Answer, Ask, More, Open, pack_floats, pack_ids
from server.cloud.config import UpstreamSection
from server.cloud.decide import TAKE
from server.cloud.logprobs import Candidate, Identifier, Position
from server.cloud.openai_client import OpenAiClient, Reply
from server.cloud.prompt import Prompt, check_length
from server.cloud.upstream import Conversation, Upstream

_LONGEST = 8  # tokens of one answer: a draft longer than that is not followed further

Body: TypeAlias = dict[str, Any]
Units: TypeAlias = "list[int] | bytes"


class OpenAiUpstream(Upstream):
    """Make it inside a running event loop. `tokenizer`: the LLM's own, None if the server takes text only."""

    def __init__(
        self,
        config: UpstreamSection,
        tokenizer: Tokenizer | None = None,
        *,
        prompt_tokens: int = 4096,
    ) -> None:
        self.name = config.model_name
        self.tokenizer = tokenizer.fingerprint if tokenizer else ""
        self.exact = False
        self.top = config.top
        self._config = config
        self._prompt_tokens = prompt_tokens
        self._client = OpenAiClient(config)
        self._tokenizer = tokenizer
        self._identifier = Identifier(tokenizer) if tokenizer else None

    async def open(self, request: Open) -> Conversation:
        same = self.same_tokenizer(request)
        top = max(1, min(request.top, self._config.top))
        body = await asyncio.to_thread(self._body, request)  # a long prompt takes long to encode
        return _Conversation(self._client, body, self._identifier, request, same, top)

    def _body(self, request: Open) -> Callable[[Units], Body]:
        """What asks the server for the token after an answer so far."""
        if self._config.endpoint == "chat":
            return _chat_body(request, self._prompt_tokens)
        if self._tokenizer is None:
            return _text_body(request, self._prompt_tokens)
        prompt = Prompt(self._tokenizer, request, self._prompt_tokens)
        return lambda answer: {"prompt": prompt.follow(answer), "return_tokens_as_token_ids": True}

    async def ready(self) -> bool:
        return await self._client.reachable()

    async def close(self) -> None:
        await self._client.close()


class _Conversation(Conversation):
    def __init__(
        self,
        client: OpenAiClient,
        body: Callable[[Units], Body],
        identifier: Identifier | None,
        request: Open,
        same: bool,
        top: int,
    ) -> None:
        self._same = same
        self._client = client
        self._body = body
        self._identifier = identifier
        self._request = request
        self._top = top
        self._reply: Reply | None = None  # a stream that goes on after what was decided last
        self._length = 0  # units of the answer and what was decided after it
        self._step = 0

    async def ask(self, ask: Ask, answer: Units) -> Answer:
        if isinstance(answer, bytes) == self._same:
            raise RequestError("the answer must be in the session's units", "tokens")
        self._length, self._step = len(answer), ask.step
        decides = self._request.mode == "take" or not self._same
        burst = self._request.burst if self._request.mode == "take" else 0
        position = await self._first(answer, burst)
        if self._same:
            assert not isinstance(answer, bytes)
            return self._token_answer(ask, position, self._decide(position) if decides else None)
        assert isinstance(answer, bytes)
        return await self._text_answer(ask, answer, position)

    async def more(self) -> More | None:
        if self._reply is None:
            return None
        position = await self._reply.next()
        if position is None:
            self.close()
            return None
        token = self._decide(self._known(position))
        return More(
            self._request.session,
            self._step,
            token=token.id if self._same and token.id is not None else -1,
            text=token.piece,
        )

    def close(self) -> None:
        if self._reply is not None:
            self._reply.close()
            self._reply = None

    async def _first(self, answer: Units, burst: int) -> Position:
        self.close()
        self._reply = await self._client.complete(self._body(answer), self._top, 1 + burst)
        position = await self._reply.next()
        if position is None:
            raise UpstreamError("the LLM's server gave no log-probabilities: it has to support them")
        return self._known(position)

    def _known(self, position: Position) -> Position:
        return self._identifier.position(position) if self._identifier else position

    def _decide(self, position: Position) -> Candidate:
        """The token to emit. The stream follows the server's own one, so another one ends it, as the end does."""
        token = position.token
        if self._request.sampling.temperature > 0.0 and position.top:
            sampling = msgspec.structs.replace(self._request.sampling, repetition_penalty=1.0)
            logp = np.array([candidate.logp for candidate in position.top], np.float32)
            drawn = shape(logp, sampling).draw(uniform(sampling.seed, self._length, TAKE))
            token = position.top[drawn]
        if token[:2] != position.token[:2] or not token.piece:
            self.close()
        self._length += 1 if self._same else len(token.piece)
        return token

    def _token_answer(self, ask: Ask, position: Position, token: Candidate | None) -> Answer:
        top = position.top
        ids = np.array([candidate.id for candidate in top], np.int64)
        return Answer(
            ask.session,
            ask.step,
            tokens=[token.id] if token is not None and token.id is not None else [],
            y_ids=pack_ids(ids),
            y_logp=_packed(top),
            y_draft=_sum([candidate for candidate in top if candidate.id == ask.draft]),
        )

    async def _text_answer(self, ask: Ask, answer: bytes, first: Position) -> Answer:
        """Goes on past one token while what is decided is only the beginning of the draft."""
        position, text, count, path, y_draft = first, b"", 0, 1.0, -1.0
        while True:
            count += 1
            rest = ask.draft_text[len(text) :]
            likely = _sum([c for c in position.top if (c.piece.startswith(rest) if rest else not c.piece)])
            if likely >= 0.0:
                y_draft = max(0.0, y_draft) + path * likely
            token = self._decide(position)
            text += token.piece
            path *= float(np.exp(token.logp))
            begun = len(text) < len(ask.draft_text) and ask.draft_text.startswith(text)
            if not token.piece or not begun or count == _LONGEST:
                break
            following = await self._reply.next() if self._reply else None
            position = self._known(following) if following else await self._first(answer + text, 0)
        return Answer(
            ask.session,
            ask.step,
            text=text,
            y_pieces=[candidate.piece for candidate in first.top],
            y_logp=_packed(first.top),
            y_draft=min(1.0, y_draft),
            llm_tokens=count,
        )


def _packed(top: list[Candidate]) -> bytes:
    return pack_floats(np.array([candidate.logp for candidate in top], np.float32))


def _sum(candidates: list[Candidate]) -> float:
    """Their probability, -1 if there are none: then all that is known is that it is small."""
    return float(sum(np.exp(candidate.logp) for candidate in candidates)) if candidates else -1.0


def _chat_body(request: Open, limit: int) -> Callable[[Units], Body]:
    if isinstance(request.prompt, str):
        raise RequestError("the LLM's server only chats here: send messages, or let it use completions", "prompt")
    messages = [{"role": message.role, "content": message.content} for message in request.prompt]
    check_length(request, limit)

    def body(answer: Units) -> Body:
        if not answer:
            return {"messages": messages}
        begun = {"role": "assistant", "content": _text(answer)}
        return {"messages": [*messages, begun], "continue_final_message": True, "add_generation_prompt": False}

    return body


def _text_body(request: Open, limit: int) -> Callable[[Units], Body]:
    if isinstance(request.prompt, str):
        prompt = request.prompt
    else:  # ChatML
        turns = [f"<|im_start|>{message.role}\n{_harmless(message.content)}<|im_end|>\n" for message in request.prompt]
        prompt = "".join(turns) + "<|im_start|>assistant\n"
    check_length(request, limit)
    return lambda answer: {"prompt": prompt + _text(answer)}


def _harmless(content: str) -> str:
    """The other server reads control tokens wherever they stand in a text: a message must not end its own turn."""
    return content.replace("<|", "< |")


def _text(answer: Units) -> str:
    assert isinstance(answer, bytes)
    return answer.decode("utf-8", "ignore")
