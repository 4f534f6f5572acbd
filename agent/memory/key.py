"""Where a step stands in memory: its key, from the SLM's last hidden state, and its tail, from the last tokens.

Hidden states lie in a narrow cone with a few huge dimensions (Ethayarajh, 2019; Timkey and van Schijndel, 2021): as
they are, any two have a high cosine. So each dimension is centred and scaled by its mean and deviation over a fixed
text, and a random projection (Johnson and Lindenstrauss, 1984) keeps what cosines need. All of that follows from the
model's file alone, so the peers of a space make the same keys without a word. docs/memory.md has the figures.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.memory.base import Key
from models.engine.base import Engine, Mix
from protocol.memory import SPACE_BYTES

Floats = NDArray[np.float32]

KEY_BYTES = 128  # dimensions of a key; 576 and 128 serve alike, 64 hardly worse
TAILS = (1, 2, 4, 8)  # how many of the last tokens each of a tail's hashes covers
LAYER = "last"  # the hidden state that the output layer reads; the blocks before it serve alike
_RECIPE = "1: last hidden state, standardised, 128 random signs, int8"  # part of a space's name
_FLOOR = 0.1  # of the mean deviation: added to each, or a dimension that hardly moves would drown the others
_MAGIC = b"skerry-key-1\n"
CALIBRATION = (
    "The ferry leaves at seven in the morning and comes back after dark, if the weather allows it. On the island there "
    "are a school, two shops and a harbour, and in winter hardly two hundred people. Most of them work on boats.",
    "Researchers said on Tuesday that the new material conducts electricity at higher temperatures than expected. "
    'The company\'s shares rose by 4.2 % to 38.10 euros. A spokeswoman said: "We are careful about predictions."',
    "To make the soup, cut two onions, fry them in butter until they are soft, add 500 g of carrots, a litre of water "
    "and some salt, and let it cook for 25 minutes. Then blend it. Serve with bread.\n\n1. Onions\n2. Carrots\n3. Salt",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / "
    'len(values)\n\n# Returns the arithmetic mean.\nprint(mean([1, 2, 3]))\n{"sensor": 17, "status": "ok"}',
)


def space_of(fingerprint: str, adapter: str = "") -> bytes:
    """(16 bytes) Names the keys that a model (SHA-256 of its file) makes with an adapter (SHA-256, "" without one)."""
    named = "\n".join((fingerprint, adapter, LAYER, _RECIPE, *CALIBRATION))
    return hashlib.blake2b(named.encode(), digest_size=SPACE_BYTES, person=b"skerry-space").digest()


def tail(recent: Sequence[int]) -> bytes:
    """(8 bytes) Hashes, two bytes each, of the last 1, 2, 4 and 8 of the tokens before a step, prompt included."""
    ids = struct.pack(f"<{min(len(recent), TAILS[-1])}i", *recent[-TAILS[-1] :])
    return b"".join(hashlib.blake2b(ids[-4 * n :], digest_size=2, salt=bytes((n,))).digest() for n in TAILS)


def shared_tail(a: bytes, b: bytes) -> int:
    """How many of the last tokens two tails say are the same: 0, 1, 2, 4 or 8."""
    shared = 0
    for at, n in enumerate(TAILS):
        if a[2 * at : 2 * at + 2] != b[2 * at : 2 * at + 2]:
            break
        shared = n
    return shared


class KeyMaker:
    """Keys of one space. `mean` and `deviation` (d,) float32: of the model's hidden states over the calibration
    text."""

    def __init__(self, space: bytes, mean: Floats, deviation: Floats) -> None:
        self.space = space
        self._mean = mean
        self._deviation = deviation
        self._scale = deviation + _FLOOR * deviation.mean()
        self._projection = _signs(len(mean)) / self._scale

    @property
    def width(self) -> int:
        """d."""
        return len(self._mean)

    @classmethod
    def calibrate(cls, engine: Engine, adapter: str = "") -> KeyMaker:
        """Reads the calibration text with the model: some 200 single-token passes, so keep the result (`save`).

        The engine must give hidden states and have a place free; `adapter` is attached to it. Raises Overloaded,
        ContextFull.
        """
        mix: Mix = ((adapter, 1.0),) if adapter else ()
        texts: list[Floats] = []
        for text in CALIBRATION:
            ids = engine.tokenizer.encode(text, start=True)
            place = engine.open(ids, 0, mix)
            place.rewind(0)
            read: list[Floats] = []
            for token in ids:
                (step,) = engine.forward([(place, [token])])
                assert step.hidden is not None, "the engine was opened without hidden states"
                read.append(step.hidden.copy())
            place.close()
            texts.append(np.array(read))
        return cls.of(space_of(engine.info.fingerprint, adapter), texts)

    @classmethod
    def of(cls, space: bytes, texts: Sequence[Floats]) -> KeyMaker:
        """From the hidden states (T, d) that the model has at the tokens of each calibration text."""
        # The first token's state is like no other: all attention falls on itself.
        seen = np.concatenate([states[1:] for states in texts]).astype(np.float64)
        return cls(space, seen.mean(axis=0).astype(np.float32), seen.std(axis=0).astype(np.float32))

    def standardise(self, hidden: Floats) -> Floats:
        """(d,) The hidden state centred and scaled, of length 1; 0 if there is nothing to scale."""
        centred = (hidden - self._mean) / self._scale
        length = float(np.sqrt(np.einsum("i,i", centred, centred)))
        return centred / np.float32(length) if 0.0 < length < np.inf else np.zeros_like(self._mean)

    def key(self, hidden: Floats) -> Key:
        """(128,) int8 of a hidden state (d,) float32; its largest component is 127 or -127."""
        # Not matmul: BLAS would start threads that spin on the cores which the model needs.
        projected = np.einsum("kd,d->k", self._projection, hidden - self._mean)
        peak = float(np.abs(projected).max())
        if not 0.0 < peak < np.inf:
            return np.zeros(KEY_BYTES, np.int8)
        projected *= np.float32(127.0 / peak)
        key: Key = np.rint(projected, out=projected).astype(np.int8)
        return key

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises OSError."""
        content = _MAGIC + self.space + self._mean.astype("<f4").tobytes() + self._deviation.astype("<f4").tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            whole.write_bytes(content + hashlib.sha256(content).digest())
            whole.replace(path)
        finally:
            whole.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, space: bytes, width: int) -> KeyMaker | None:
        """What `save` wrote for this space and hidden states of `width`; None if the file is not there, damaged or of
        another space."""
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        content, checksum = raw[:-32], raw[-32:]
        head = _MAGIC + space
        sound = hashlib.sha256(content).digest() == checksum and content.startswith(head)
        if not sound or len(content) != len(head) + 8 * width:
            return None
        mean, deviation = np.frombuffer(content[len(head) :], "<f4").astype(np.float32).reshape(2, width)
        return cls(space, mean, deviation)


def keys_beside(adapter: Path) -> Path:
    """Where the keys of an adapter's space are kept: beside its file."""
    return adapter.with_suffix(".keys")


def prepare_keys(engine: Engine, id: str, adapter: Path) -> None:
    """Makes what memory needs before the adapter comes into use: it is attached to `engine` as `id`, and `adapter` is
    where its file will be served from. Takes as long as `calibrate`. Raises OSError, Overloaded, ContextFull."""
    KeyMaker.calibrate(engine, id).save(keys_beside(adapter))


@lru_cache(maxsize=2)
def _signs(width: int) -> Floats:
    """(128, d) of -1 and 1, the same everywhere."""
    stream = hashlib.shake_256(b"skerry-projection").digest(KEY_BYTES * width // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)).astype(np.float32)
    return (2 * bits - 1).reshape(KEY_BYTES, width)
