"""What an Answer says where device and LLM have different tokenizers: bytes instead of tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import numpy as np

from models.engine.base import Tokenizer
from models.sampling import Floats, Ids, log_softmax, shape, top_ids, uniform
from protocol.resolve import Answer, Ask, Open, pack_floats
from server.cloud.decide import TAKE
from server.cloud.scheduler import Job

_LONGEST = 8  # tokens of one answer: a draft longer than that is not followed further


class Pieces:
    """The bytes of every token of a vocabulary, sorted, so that tokens are found by how they begin."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab)]
        order = sorted(range(len(pieces)), key=pieces.__getitem__)
        self._sorted = [pieces[token] for token in order]
        self._ids: Ids = np.array(order, np.intp)
        self._ends: Ids = np.array(sorted(tokenizer.eog), np.intp)
        self.tokenizer = tokenizer

    def beginning_with(self, text: bytes) -> Ids:
        """Tokens whose bytes equal or extend `text`; for b"" those that end an answer."""
        if not text:
            return self._ends
        low = bisect_left(self._sorted, text)
        return self._ids[low : bisect_right(self._sorted, text, key=lambda piece: piece[: len(text)])]

    def spoken(self, tokens: Iterable[int]) -> list[int]:
        """Those of `tokens` that stand for bytes or for the end, which control tokens in between do not."""
        tokenizer = self.tokenizer
        return [token for token in tokens if tokenizer.piece(token) or token in tokenizer.eog]


def decide_text(
    pieces: Pieces, request: Open, ask: Ask, tokens: list[int], answer: int, prompt: int
) -> Job[tuple[Answer, list[int]]]:
    """The Answer to `ask` after `tokens`, the prompt and the answer so far in the LLM's own tokens, and the tokens with
    what it decided at their end.

    `answer` is the answer's length in bytes, `prompt` the prompt's in tokens. Goes on past one token while what is
    decided is only the beginning of the draft or ends inside a character.
    """
    text, first, count = b"", None, 0
    y_draft, path = 0.0, 1.0
    while True:
        logits = yield tokens
        count += 1
        logp = log_softmax(logits)
        first = logp if first is None else first
        if ask.draft_text.startswith(text):
            extending = pieces.beginning_with(ask.draft_text[len(text) :])
            y_draft += path * float(np.exp(logp[extending]).sum())
        draw = uniform(request.sampling.seed, answer + len(text), TAKE)
        token = shape(logits, request.sampling, tokens[prompt:]).draw(draw)
        piece = pieces.tokenizer.piece(token)
        if not piece:
            break
        text += piece
        tokens = [*tokens, token]
        path *= float(np.exp(logp[token]))
        if count == _LONGEST or not (_begins(text, ask.draft_text) or _inside_character(text)):
            break
    ids, y_logp = _listed(pieces, first, request.top)
    reply = Answer(
        ask.session,
        ask.step,
        text=text,
        y_pieces=[pieces.tokenizer.piece(token) for token in ids],
        y_logp=pack_floats(y_logp),
        y_draft=min(1.0, y_draft),
        llm_tokens=count,
    )
    return reply, tokens


def _listed(pieces: Pieces, logp: Floats, top: int) -> tuple[list[int], Floats]:
    ids = pieces.spoken(top_ids(logp, top).tolist() if top > 0 else [])
    return ids, logp[np.asarray(ids, np.intp)]


def _begins(text: bytes, draft: bytes) -> bool:
    return len(text) < len(draft) and draft.startswith(text)


def _inside_character(text: bytes) -> bool:
    """Whether `text` stops before the last byte of a UTF-8 character."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
