"""What escalations cost on the wire: the product's own messages, encoded and counted.

Mode take, whose Answers carry the LLM's 16 likeliest tokens, both the agent's defaults, over a connection that stands:
the frames of the WebSocket are counted, the handshakes and what TCP and TLS add are not. Numbers of sessions and steps
are taken as small, and log-probabilities always take four bytes, so a message may be off by a few bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.engine.base import Tokenizer
from protocol import resolve as wire
from protocol.resolve import Answer, Ask, Close, Message, More, Open, Sampling, pack_floats, pack_ids

_TOP = 16  # the agent's default


class Dialogue:
    """Of one pair of models; with two tokenizers it is held in bytes. All numbers are bytes."""

    def __init__(self, slm: Tokenizer, llm: Tokenizer) -> None:
        self._slm, self._llm = slm, llm
        self._device = slm.fingerprint
        self._same = slm.fingerprint == llm.fingerprint

    def open(self, messages: Sequence[Message]) -> int:
        """Open and Close."""
        opened = Open(1, list(messages), self._device, Sampling(), "take", _TOP)
        return _up(opened) + _up(Close(1))

    def ask(self, keep: int, draft: int) -> int:
        """An Ask about `draft` that brings no new tokens, after `keep` tokens or bytes."""
        if self._same:
            return _up(Ask(1, 1, keep, draft=draft))
        return _up(Ask(1, 1, keep, draft_text=self._slm.piece(draft)))

    def said(self, token: int) -> int:
        """What a token of the answer adds to the next Ask."""
        if not self._same:
            return len(self._slm.piece(token))
        return len(wire.encode(Ask(1, 1, 0, [token]))) - len(wire.encode(Ask(1, 1, 0)))

    def answer(self, said: Sequence[int], likeliest: Sequence[int]) -> int:
        """The Answer that decides for the LLM's tokens `said`, the first one alone with one tokenizer; `likeliest` (at
        least one) are repeated up to as many as it carries."""
        logp = pack_floats(np.zeros(_TOP, np.float32))
        top = [likeliest[at % len(likeliest)] for at in range(_TOP)]
        if self._same:
            p = pack_floats(np.zeros(1, np.float32))
            ids = pack_ids(np.array(top))
            return _down(Answer(1, 1, list(said[:1]), y_ids=ids, y_logp=logp, y_draft=0.5, tokens_p=p))
        pieces = [self._llm.piece(token) for token in top]
        text = self._llm.decode(said)
        return _down(Answer(1, 1, text=text, y_pieces=pieces, y_logp=logp, y_draft=0.5, llm_tokens=len(said)))

    def more(self, token: int) -> int:
        """One more token behind an Answer."""
        return _down(More(1, 1, token) if self._same else More(1, 1, text=self._llm.piece(token)))


def _up(message: wire.FromDevice) -> int:
    return wire.wire_size(len(wire.encode(message)), masked=True)


def _down(message: wire.FromCloud) -> int:
    return wire.wire_size(len(wire.encode(message)), masked=False)
