"""The Engine seam: one model, several independent sequences, one batched forward pass.

An engine MUST:
- give logits of shape (V,) and the last hidden state of shape (d,), both float32 and without a copy; they are valid
  until the next `forward`;
- rewind a sequence to any earlier position, after which the same tokens give the same logits;
- keep sequences independent: what is fed to one never changes another, also where they wear different adapters;
- never be used from two threads at once (whoever owns it owns the thread).

What every engine shares stands here: handing out sequences, counting the cells of the context they may use, reusing
the longest common prefix of an earlier request, and which adapters are attached.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models import adapter as adapters
from models.adapter import Adapter
from protocol.errors import BadAdapter, ContextFull, Overloaded

Floats = NDArray[np.float32]

_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # what surrogateescape makes of it

Mix: TypeAlias = tuple[tuple[str, float], ...]
"""Adapters that change the model for one request: (id, scale), sorted by id; () is the bare model."""

WINDOW = 256
"""Most tokens that `last_hidden` reads. They have cells of their own beside the context."""


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

    def encode(self, text: str | bytes, *, start: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`. `start` adds the model's begin token where it wants one; `special` reads control
        tokens such as `<|im_start|>` written in the text (chat templates). Bytes that are no UTF-8 keep their value;
        what no token stands for is left out."""
        if isinstance(text, str):
            return self._encode(text, start, special)
        # Bytes that are no UTF-8, such as half a character, would become U+FFFD in the libraries.
        parts = _NOT_UTF8.split(text.decode("utf-8", "surrogateescape"))
        tokens = self._encode(parts[0], start, special)
        for broken, whole in zip(parts[1::2], parts[2::2], strict=True):
            tokens += self._spell(broken.encode("utf-8", "surrogateescape"))
            tokens += self._encode(whole, False, special)
        return tokens

    @abstractmethod
    def _encode(self, text: str, start: bool, special: bool) -> list[int]:
        """As `encode`, of text that is UTF-8 throughout."""

    def _spell(self, raw: bytes) -> list[int]:
        """The fewest tokens from the left; a byte that no token stands for is left out."""
        tokens: list[int] = []
        at = 0
        while at < len(raw):
            length = next((n for n in (4, 3, 2) if raw[at : at + n] in self._by_bytes), 1)
            token = self._by_bytes.get(raw[at : at + length])
            tokens += [] if token is None else [token]
            at += length
        return tokens

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """The tokens of up to four bytes, a character's most."""
        pieces = ((self.piece(token), token) for token in reversed(range(self.vocab)))
        return {piece: token for piece, token in pieces if 0 < len(piece) <= 4}

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
    """One conversation's place in the context: the tokens that the model has seen, in order, and the adapters that it
    saw them with."""

    __slots__ = ("_engine", "closed", "id", "mix", "reserved", "tokens")

    def __init__(self, engine: Engine, id: int) -> None:
        self._engine = engine
        self.id = id
        self.tokens: list[int] = []
        self.mix: Mix = ()
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

    def use(self, mix: Mix) -> None:
        """Goes on with these adapters; forgets all tokens if others read them. Raises BadAdapter if one is not
        attached."""
        if mix != self.mix:
            self._engine.check_attached(mix)
            self.rewind(0)
            self.mix = mix
            self._engine._let_go()

    def close(self) -> None:
        """Gives the place back. Its tokens stay as a cache until the room is needed."""
        self.closed = True
        self.reserved = len(self.tokens)
        self._engine._let_go()


class Engine(ABC):
    """See the module's docstring for the contract."""

    info: ModelInfo
    tokenizer: Tokenizer
    _hidden = True  # whether steps give the last hidden state

    def __init__(self, sequences: int, context: int) -> None:
        self.context = context
        self._pool = [Sequence(self, id) for id in range(sequences)]
        self._reader = Sequence(self, sequences)  # what `last_hidden` reads with
        self._reader.reserved = WINDOW
        self._attached: set[str] = set()
        self._leaving: set[str] = set()  # detached, but a request still uses them

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads that the next step will use."""

    @property
    def provider(self) -> str:
        """What the library runs the model on, where it has names for that; else ""."""
        return ""

    @abstractmethod
    def forward(self, feeds: Seq[tuple[Sequence, Seq[int]]]) -> list[Step]:
        """Feeds each sequence its tokens (at least one) in as few passes as possible, each mix in passes of its own.

        Returns one Step per feed, for its last token. Raises ContextFull if a feed exceeds what was reserved.
        """

    @abstractmethod
    def _trim(self, id: int, position: int) -> None:
        """Drops the cells of sequence `id` from `position` on."""

    @abstractmethod
    def close(self) -> None:
        """Frees the model. The engine can't be used afterwards."""

    @property
    def attached(self) -> frozenset[str]:
        """Ids of the adapters that a request may use."""
        return frozenset(self._attached - self._leaving)

    def attach(self, path: Path) -> str:
        """Loads an adapter beside the model and returns its id (SHA-256 of the file); nobody uses it yet.

        Raises BadAdapter if the file is damaged, or for another model.
        """
        raw = adapters.read_bytes(path)
        adapter = adapters.parse(raw)
        id = hashlib.sha256(raw).hexdigest()
        if adapter.model != self.info.fingerprint:
            raise BadAdapter(f"adapter {id[:12]} is for another model: it cannot change {self.info.name}")
        if adapter.centroid is not None and len(adapter.centroid) != self.info.width:
            raise BadAdapter(f"adapter {id[:12]}: its centroid is not of the model's width, {self.info.width}")
        if id not in self._attached:
            self._load_adapter(id, path, adapter)
            self._attached.add(id)
        self._leaving.discard(id)
        return id

    def detach(self, id: str) -> None:
        """No request may use it from now on. Those that do keep it, and its memory, until they end."""
        if id in self._attached:
            self._leaving.add(id)
            self._let_go()

    def check_attached(self, mix: Mix) -> None:
        """Raises BadAdapter unless every adapter of the mix is attached and its scale a number."""
        for id, scale in mix:
            if id not in self._attached or id in self._leaving:
                raise BadAdapter(f"adapter {id[:12]} is not attached: `skerry adapt list` shows what is in use")
            if not math.isfinite(scale):
                raise BadAdapter(f"adapter {id[:12]}: its scale is no finite number")

    def _let_go(self) -> None:
        """Frees the detached adapters that no request uses any more."""
        if self._leaving:
            used = {id for sequence in self._pool if not sequence.closed for id, _ in sequence.mix}
            for id in self._leaving - used:
                self._free_adapter(id)

    def _load_adapter(self, id: str, path: Path, adapter: Adapter) -> None:
        """Makes the engine know the adapter. Raises BadAdapter if it does not fit the model."""
        raise BadAdapter(f"{self.info.name}: this engine runs the bare model only")

    def _free_adapter(self, id: str) -> None:
        """Undoes `_load_adapter`; no open sequence uses it."""
        self._attached.remove(id)
        self._leaving.remove(id)

    def last_hidden(self, tokens: Seq[int]) -> Floats:
        """(d,) The bare model's last hidden state after the tokens, 1 to WINDOW of them, also from an engine that was
        opened without. It takes no cells from requests, and a prefix shared with the call before costs nothing.

        Raises ContextFull if there are more tokens.
        """
        opened, self._hidden = self._hidden, True
        try:
            (step,) = self.forward([(self._reader, self._reader.align(tokens))])
        finally:
            self._hidden = opened
        assert step.hidden is not None
        return step.hidden.copy()

    @property
    def free(self) -> int:
        """Sequences that nobody uses."""
        return sum(1 for sequence in self._pool if sequence.closed)

    def open(self, prompt: Seq[int], reserve: int, mix: Mix = ()) -> Sequence:
        """A sequence for `prompt` plus `reserve` more tokens, on the place that shares the longest prefix read with the
        same adapters.

        Raises ContextFull if it can never fit, Overloaded if there is no room now, BadAdapter if an adapter is not
        attached.
        """
        self.check_fits(len(prompt), reserve)
        self.check_attached(mix)
        cells = len(prompt) + reserve
        free = [sequence for sequence in self._pool if sequence.closed]
        busy = sum(sequence.reserved for sequence in self._pool if not sequence.closed)
        if not free or busy + cells > self.context:
            raise Overloaded("every place for a request is taken: try again shortly")

        def shared(sequence: Sequence) -> int:
            return common_prefix(sequence.tokens, prompt) if sequence.mix == mix else 0

        best = max(free, key=lambda sequence: (shared(sequence), -len(sequence.tokens)))
        best.rewind(shared(best))
        best.mix = mix
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
