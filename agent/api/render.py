"""Answers as the objects of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import codecs
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

from agent.agent import Account, Piece
from agent.api.answer import Portion
from models.engine.base import Tokenizer

Json = dict[str, Any]
_LEAST_P = 1e-38  # keeps log-probabilities finite


@dataclass(frozen=True, slots=True)
class Head:
    """What all objects of one answer share. `id`: without prefix. `created`: Unix time, seconds."""

    id: str
    created: int
    model: str
    fingerprint: str


class Rendering(ABC):
    """One answer's objects. `logprobs`, `tokens`: whether log-probabilities and the list of tokens are wanted."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, tokens: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._wants_logprobs = logprobs
        self._wants_tokens = tokens

    @abstractmethod
    def opening(self) -> Json | None:
        """The choice of the chunk that comes before all text."""

    @abstractmethod
    def content(self, text: str, *, whole: bool) -> Json:
        """The choice's fields that hold `text`."""

    @abstractmethod
    def logprobs(self, pieces: Iterable[Piece]) -> Json:
        """The choice's `logprobs`. Called once for each shown token, in order."""

    def whole(self, portions: Sequence[Portion], account: Account) -> Json:
        text = "".join(portion.text for portion in portions)
        shown = [piece for portion in portions if portion.text for piece in portion.pieces]
        choice = self._choice(self.content(text, whole=True), shown, account.finish)
        choice["skerry"] = self._skerry(portions, account)
        return self._object(self.kind, [choice]) | {"usage": usage(account)}

    async def chunks(
        self, events: AsyncGenerator[Portion | Account, None], *, include_usage: bool
    ) -> AsyncGenerator[Json, None]:
        """The chunks of a stream, the first one as soon as there is something to say."""
        portions: list[Portion] = []
        extra: Json = {"usage": None} if include_usage else {}
        opening = self.opening()
        async with aclosing(events) as answer:
            async for event in answer:
                if opening is not None:
                    yield self._chunk([opening]) | extra
                    opening = None
                if isinstance(event, Account):
                    choice = self._choice(self.content("", whole=False), (), event.finish)
                    yield self._chunk([choice | {"skerry": self._skerry(portions, event)}]) | extra
                    if include_usage:
                        yield self._chunk([]) | {"usage": usage(event)}
                    return
                portions.append(event)
                if event.text:
                    choice = self._choice(self.content(event.text, whole=False), event.pieces, None)
                    yield self._chunk([choice]) | extra

    def _choice(self, content: Json, pieces: Sequence[Piece], finish: str | None) -> Json:
        logprobs = self.logprobs(pieces) if self._wants_logprobs and (pieces or "message" in content) else None
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, choices: list[Json]) -> Json:
        return self._object(self.chunk_kind, choices)

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.prefix + self._head.id,
            "object": kind,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
            "choices": choices,
        }

    def _skerry(self, portions: Sequence[Portion], account: Account) -> Json:
        """Who wrote the answer and what it cost."""
        described: Json = {
            "counts": account.counts,
            "mean_u": account.mean_u,
            "llm_tokens": account.llm_tokens,
            "bytes_up": account.bytes_up,
            "bytes_down": account.bytes_down,
            "peer_bytes_up": account.peer_bytes_up,
            "peer_bytes_down": account.peer_bytes_down,
            "borrowed": account.borrowed,
            "threshold": account.threshold,
            "mode": account.mode,
            "privacy": account.privacy,
            "fingerprint": account.fingerprint,
            "adapter": account.adapters[0].id if len(account.adapters) == 1 else None,
        }
        if len(account.adapters) > 1:
            described["mix"] = [{"adapter": used.id, "weight": used.weight} for used in account.adapters]
        if self._wants_tokens:
            described["tokens"] = [
                {
                    "text": piece.raw.decode("utf-8", "replace"),
                    "u": piece.token.u,
                    "provenance": str(piece.token.provenance),
                }
                for portion in portions
                for piece in portion.pieces
            ]
        return described

    def _written(self, token: int) -> bytes:
        """A token's bytes; a control token as it is written, e.g. `<|im_end|>`."""
        return self._tokenizer.piece(token) or self._tokenizer.control(token).encode()


class ChatRendering(Rendering):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def opening(self) -> Json:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def content(self, text: str, *, whole: bool) -> Json:
        if whole:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, pieces: Iterable[Piece]) -> Json:
        entries = []
        for piece in pieces:
            top = [self._entry(token, logprob) for token, logprob in piece.token.top]
            entries.append(self._entry(piece.token.id, logprob_of(piece)) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        raw = self._written(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


class TextRendering(Rendering):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, tokens: bool) -> None:
        super().__init__(head, tokenizer, logprobs=logprobs, tokens=tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the answer before the next token

    def opening(self) -> None:
        return None

    def content(self, text: str, *, whole: bool) -> Json:
        return {"text": text}

    def logprobs(self, pieces: Iterable[Piece]) -> Json:
        """The legacy object: parallel lists; `text_offset` counts characters from the answer's beginning."""
        tokens, logprobs, top, offsets = [], [], [], []
        for piece in pieces:
            tokens.append(self._text(piece.token.id))
            logprobs.append(logprob_of(piece))
            top.append({self._text(token): logprob for token, logprob in piece.token.top})
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(piece.raw))
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _text(self, token: int) -> str:
        return self._written(token).decode("utf-8", "replace")


def logprob_of(piece: Piece) -> float:
    """By the distribution of whoever produced the token."""
    return math.log(max(piece.token.p, _LEAST_P))


def usage(account: Account) -> Json:
    return {
        "prompt_tokens": account.prompt_tokens,
        "completion_tokens": account.tokens,
        "total_tokens": account.prompt_tokens + account.tokens,
    }
