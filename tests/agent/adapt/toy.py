"""An engine without a model: bytes are tokens, and what each adapter makes of them is a function of the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.adapt.lesson import Lesson, Target
from models.adapter import Adapter
from models.engine.base import Engine, ModelInfo, Step, Tokenizer
from models.engine.base import Sequence as Place
from tests.agent.adapt.adapters import MODEL

VOCAB = 256
END = 0
ASKED, ANSWER = ord("?"), ord("!")

Floats = NDArray[np.float32]
Mind = Callable[[list[int], Floats], Floats]
"""From the tokens so far and the bare model's logits to its own."""

_TABLE = np.random.default_rng(7).standard_normal((VOCAB, VOCAB)).astype(np.float32)
_TABLE[np.arange(VOCAB), (np.arange(VOCAB) + 1) % VOCAB] += 5.0  # the bare model counts
_TABLE[:, END] = -9.0  # and goes on writing


class Bytes(Tokenizer):
    vocab = VOCAB
    eog = frozenset({END})
    end_id = END
    template = None
    fingerprint = "bytes"
    controls: frozenset[str] = frozenset()
    begin = end = ""

    def _encode(self, text: str, start: bool, special: bool) -> list[int]:
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        return bytes((token,))

    def control(self, token: int) -> str:
        return ""


class Toy(Engine):
    """`minds` by adapter id."""

    threads = 1

    def __init__(self, minds: dict[str, Mind]) -> None:
        super().__init__(sequences=4, context=4096)
        self.info = ModelInfo("toy", MODEL, "llama", VOCAB, 16, 4096)
        self.tokenizer = Bytes()
        self._minds = minds

    def forward(self, feeds: Sequence[tuple[Place, Sequence[int]]]) -> list[Step]:
        steps = []
        for place, tokens in feeds:
            place.tokens += tokens
            logits = _TABLE[place.tokens[-1]].copy()
            for id, _ in place.mix:
                logits = self._minds[id](place.tokens, logits)
            steps.append(Step(logits, None))
        return steps

    def _trim(self, id: int, position: int) -> None:
        pass

    def _load_adapter(self, id: str, path: Path, adapter: Adapter) -> None:
        pass

    def close(self) -> None:
        pass


def toy_lessons(count: int, private: bool = False) -> list[Lesson]:
    """After a question mark comes an exclamation mark."""
    made = []
    for number in range(count):
        tokens = [*f"{'p' if private else 'q'}{number}?".encode(), ANSWER]
        made.append(Lesson(tokens, [Target(len(tokens) - 1, "label", [ANSWER])], "example", private))
    return made
