"""A model at the Engine seam whose logits are drawn by a hash of all tokens so far, with a vocabulary of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.engine.base import Engine, Floats, ModelInfo, Step, Tokenizer
from models.engine.base import Sequence as Place
from tools.eval.recordings import Model

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


class FakeTokenizer(Tokenizer):
    """Every ASCII character, `words` besides, and at the end a control token and the end of an answer."""

    begin, end, controls, template = "", "<end>", frozenset[str](), TEMPLATE

    def __init__(self, *words: bytes) -> None:
        self.pieces = [bytes([code]) for code in range(128)] + [*words, b"", b""]
        self.vocab = len(self.pieces)
        self.control_id, self.end_id = self.vocab - 2, self.vocab - 1
        self.eog = frozenset([self.end_id])

    def _encode(self, text: str, start: bool, special: bool) -> list[int]:
        """The longest piece from the left; other bytes are left out."""
        raw, tokens, at = text.encode(), [], 0
        while at < len(raw):
            fits = [t for t, piece in enumerate(self.pieces) if piece and raw.startswith(piece, at)]
            best = max(fits, key=lambda t: len(self.pieces[t]), default=None)
            tokens += [] if best is None else [best]
            at += 1 if best is None else len(self.pieces[best])
        return tokens

    def piece(self, token: int) -> bytes:
        return self.pieces[token]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.pieces).encode()).hexdigest()

    def control(self, token: int) -> str:
        return f"<{token}>"


class FakeEngine(Engine):
    """`passes`: how many sequences each pass fed."""

    tokenizer: FakeTokenizer

    def __init__(self, tokenizer: FakeTokenizer, seed: int, context: int = 8192) -> None:
        super().__init__(sequences=8, context=context)
        self.tokenizer = tokenizer
        self.info = ModelInfo("fake", "", "", tokenizer.vocab, 8, context)
        self.passes: list[int] = []
        self.seed = seed

    threads = 1

    def logits(self, tokens: Sequence[int]) -> Floats:
        """(V,): peaked, so that the likely ones matter."""
        digest = hashlib.sha256(repr((self.seed, list(tokens))).encode()).digest()
        rng = np.random.default_rng(list(digest))
        logits = (rng.normal(size=self.tokenizer.vocab) * 3).astype(np.float32)
        logits[self.tokenizer.control_id] = -20.0  # no model writes these into an answer
        return logits

    def forward(self, feeds: Sequence[tuple[Place, Sequence[int]]]) -> list[Step]:
        self.passes.append(len(feeds))
        for place, tokens in feeds:
            self._check_room(place, len(tokens))
            place.tokens.extend(tokens)
        found = [self.logits(place.tokens) for place, _ in feeds]
        return [Step(logits, logits[:8]) for logits in found]

    def _trim(self, id: int, position: int) -> None:
        pass

    def close(self) -> None:
        pass


class FakeModel(Model):
    def __init__(self, name: str, tokenizer: FakeTokenizer, *, context: int = 8192, hidden: bool = True) -> None:
        super().__init__(Path(name), threads=1, hidden=hidden)
        self.fingerprint = name
        self.tokenizer = tokenizer
        self.engine = self.fake = FakeEngine(tokenizer, sum(name.encode()), context)
