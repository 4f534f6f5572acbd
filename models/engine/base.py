"""The Engine seam: one model, several independent sequences, one batched forward pass.

An engine MUST:
- give logits of shape (V,) and the last hidden state of shape (d,), both float32 and without a copy; they are valid
  until the next `forward`;
- rewind a sequence to any earlier position, after which the same tokens give the same logits;
- keep sequences independent: what is fed to one never changes another;
- never be used from two threads at once (whoever owns it owns the thread).

What every engine shares stands here: handing out sequences, counting the cells of the context they may use, and
reusing the longest common prefix of an earlier request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ContextFull, Overloaded

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a loaded model. `fingerprint` is the SHA-256 of its file."""

    name: str
    fingerprint: str
    architecture: str
    vocab: int
    width: int
    context: int


class Step(NamedTuple):
    """What the model says after the last token of a feed; views, valid until the next forward."""

    logits: Floats  # (V,)
    hidden: Floats | None  # (d,), None if the engine was opened without


class Tokenizer(ABC):
    """Text to token ids and back, byte-exact."""

    vocab: int
    eog: frozenset[int]  # tokens that end a generation
    end_id: int  # the token that this side writes to end an answer, -1 if it has none
    template: str | None  # the chat template (jinja) of the model file

    @abstractmethod
    def encode(self, text: str | bytes, *, start: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`. `start` adds the model's begin token where it wants one; `special` reads control
        tokens such as `<|im_start|>` written in the text (chat templates). Bytes that are no UTF-8 keep their value;
        what no token stands for is left out."""

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; b"" for control tokens."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over every token's length and bytes: equal fingerprints mean index-aligned logits."""

    @property
    @abstractmethod
    def controls(self) -> frozenset[str]:
        """The written forms of all control tokens."""

    @abstractmethod
    def control(self, token: int) -> str:
        """The written form of a control token, e.g. `<|im_end|>`."""

    @property
    @abstractmethod
    def begin(self) -> str:
        """The begin token's written form, for chat templates; "" if there is none."""

    @property
    @abstractmethod
    def end(self) -> str:
        """The end token's written form, for chat templates; "" if there is none."""

    def decode(self, tokens: Seq[int]) -> bytes:
        return b"".join(map(self.piece, tokens))


class Sequence:
    """One conversation's place in the context: the tokens that the model has seen, in order."""

    __slots__ = ("_engine", "closed", "id", "reserved", "tokens")

    def __init__(self, engine: Engine, id: int) -> None:
        self._engine = engine
        self.id = id
        self.tokens: list[int] = []
        self.reserved = 0
        self.closed = True

    def rewind(self, position: int) -> None:
        """Forgets every token from `position` on."""
        if position < len(self.tokens):
            self._engine._trim(self.id, position)
            del self.tokens[position:]

    def align(self, target: Seq[int]) -> list[int]:
        """Rewinds to the longest prefix common with `target`; returns what is missing, at least the last token."""
        keep = min(common_prefix(self.tokens, target), len(target) - 1)
        self.rewind(keep)
        return list(target[keep:])

    def close(self) -> None:
        """Gives the place back. Its tokens stay as a cache until the room is needed."""
        self.closed = True
        self.reserved = len(self.tokens)


class Engine(ABC):
    """See the module's docstring for the contract."""

    info: ModelInfo
    tokenizer: Tokenizer

    def __init__(self, sequences: int, context: int) -> None:
        self.context = context
        self._pool = [Sequence(self, id) for id in range(sequences)]

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads that the next step will use."""

    @abstractmethod
    def forward(self, feeds: Seq[tuple[Sequence, Seq[int]]]) -> list[Step]:
        """Feeds each sequence its tokens (at least one) in as few passes as possible.

        Returns one Step per feed, for its last token. Raises ContextFull if a feed exceeds what was reserved.
        """

    @abstractmethod
    def _trim(self, id: int, position: int) -> None:
        """Drops the cells of sequence `id` from `position` on."""

    @abstractmethod
    def close(self) -> None:
        """Frees the model. The engine can't be used afterwards."""

    @property
    def free(self) -> int:
        """Sequences that nobody uses."""
        return sum(1 for sequence in self._pool if sequence.closed)

    def open(self, prompt: Seq[int], reserve: int) -> Sequence:
        """A sequence for `prompt` plus `reserve` more tokens, on the place that shares the longest prefix.

        Raises ContextFull if it can never fit, Overloaded if there is no room now.
        """
        self.check_fits(len(prompt), reserve)
        cells = len(prompt) + reserve
        free = [sequence for sequence in self._pool if sequence.closed]
        busy = sum(sequence.reserved for sequence in self._pool if not sequence.closed)
        if not free or busy + cells > self.context:
            raise Overloaded("every place for a request is taken: try again shortly")
        best = max(free, key=lambda sequence: (common_prefix(sequence.tokens, prompt), -len(sequence.tokens)))
        best.rewind(common_prefix(best.tokens, prompt))
        self._evict(keep=best, cells=busy + cells)
        best.closed = False
        best.reserved = cells
        return best

    def check_fits(self, prompt: int, reserve: int) -> None:
        """Raises ContextFull if `prompt` tokens and `reserve` more can never fit."""
        if prompt + reserve > self.context:
            raise ContextFull(
                f"{prompt} prompt tokens and {reserve} more to generate do not fit the context of "
                f"{self.context} tokens: shorten the prompt or lower max_tokens",
                "messages",
            )

    def _evict(self, keep: Sequence, cells: int) -> None:
        """Drops idle caches, longest first, until `cells` fit beside them."""
        idle = sorted((s for s in self._pool if s.closed and s is not keep), key=lambda s: len(s.tokens))
        while idle and cells + sum(len(s.tokens) for s in idle) > self.context:
            idle.pop().rewind(0)

    def _check_room(self, sequence: Sequence, more: int) -> None:
        if len(sequence.tokens) + more > sequence.reserved:
            raise ContextFull(
                f"the sequence reserved {sequence.reserved} tokens and holds {len(sequence.tokens)}; {more} more "
                "do not fit: raise max_tokens or the model's context"
            )


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
