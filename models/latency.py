"""How fast this device writes with a model, by how much stands in the context: measured once and kept.

    seconds(n) = time of one decode step after n tokens

A step reads all weights, which takes the same time at every n, and the cells of the n tokens, which takes time in
proportion to n; so seconds per token lie on a line between two lengths, and beyond the last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from models.boards import processor
from models.engine.base import Engine
from models.engine.base import Sequence as Place
from protocol.errors import StoreError

STEPS = 16
"""Decode steps at each length; their median counts."""

PATIENCE = 60.0
"""Seconds that one model's measurement may take, about; longer contexts are then left out."""

_SHORTEST = 64  # tokens; lengths grow by _GROWTH
_GROWTH = 4
_TEXT = "The harbour lay still under a low grey sky, and one small boat after the other came in past the skerries. "

Rate = Annotated[float, Meta(gt=0.0, le=1e9)]


class DecodePoint(msgspec.Struct, frozen=True):
    """With `context` tokens before it, a step writes at `decode_tok_s`; the last of them were read at
    `prefill_tok_s`."""

    context: Annotated[int, Meta(ge=1)]
    decode_tok_s: Rate
    prefill_tok_s: Rate


class DecodeTable(msgspec.Struct, frozen=True):
    """Of one model on one machine. `model`: its fingerprint; `threads`: the most that the engine may use;
    `measured_at`: seconds since 1970."""

    model: str
    engine: str
    cpu: str
    threads: int
    points: Annotated[tuple[DecodePoint, ...], Meta(min_length=1)]
    measured_at: float

    def seconds(self, context: int) -> float:
        """Of one token, with so many before it. Before the first length that was measured it is the first's."""
        known = sorted((point.context, 1 / point.decode_tok_s) for point in self.points)
        if context > known[-1][0] and len(known) > 1:
            (first, before), (last, after) = known[0], known[-1]  # the farther apart, the less a disturbance counts
            return after + max(0.0, after - before) / max(1, last - first) * (context - last)
        return float(np.interp(context, [length for length, _ in known], [step for _, step in known]))

    def tok_s(self, context: int) -> float:
        return 1 / self.seconds(context)


def lengths(context: int) -> list[int]:
    """What to measure at where requests may use `context` tokens: the steps themselves need room too."""
    longest = max(1, context - STEPS)
    found = []
    length = _SHORTEST
    while length < longest:
        found.append(length)
        length *= _GROWTH
    return [*found, longest]


def measure(
    engine: Engine,
    lengths: Sequence[int],
    clock: Callable[[], float],
    progress: Callable[[DecodePoint], None],
    patience: float = PATIENCE,
) -> tuple[DecodePoint, ...]:
    """At each of the lengths, which grow and leave room for STEPS more tokens in the engine's context. `clock` gives
    seconds. After the first, a length that would take longer than what is left of `patience` ends it."""
    body = engine.tokenizer.encode(_TEXT)
    tokens = list(islice(cycle(body), lengths[-1]))
    place = engine.open(tokens, STEPS)
    points: list[DecodePoint] = []
    began = clock()
    try:
        _warm(engine, place, tokens[: lengths[0]], clock)
        for length in lengths:
            if points and _predicted(points[-1], length) > patience - (clock() - began):
                break
            points.append(_point(engine, place, tokens[:length], clock))
            progress(points[-1])
    finally:
        place.close()
    return tuple(points)


def load(folder: Path, model: str, threads: int) -> DecodeTable | None:
    """What was measured for the model (its fingerprint) on this machine with these threads; None if nothing was, or
    the file is damaged."""
    try:
        table = msgspec.json.decode(_file(folder, model).read_bytes(), type=DecodeTable)
    except (OSError, msgspec.DecodeError):
        return None
    return table if (table.model, table.cpu, table.threads) == (model, processor(), threads) else None


def save(folder: Path, table: DecodeTable) -> Path:
    """Where it was written, whole or not at all. Raises StoreError."""
    path = _file(folder, table.model)
    written = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written.write_bytes(msgspec.json.encode(table))
        written.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {error.strerror}; see to the folder device.folder") from None
    return path


def _file(folder: Path, model: str) -> Path:
    return folder / f"latency-{model[:16]}.json"


def _warm(engine: Engine, place: Place, tokens: Sequence[int], clock: Callable[[], float]) -> None:
    """The weights come from the disk, and the engine finds out how many threads serve it best."""
    _point(engine, place, tokens, clock)
    place.rewind(0)


def _point(engine: Engine, place: Place, tokens: Sequence[int], clock: Callable[[], float]) -> DecodePoint:
    """Reads what the place does not hold yet of the tokens, writes STEPS more and forgets those."""
    missing = tokens[len(place.tokens) :]
    times = [clock()]
    step = engine.forward([(place, missing)])[0]
    times.append(clock())
    for _ in range(STEPS):
        step = engine.forward([(place, [int(step.logits.argmax())])])[0]
        times.append(clock())
    place.rewind(len(tokens))
    prefill, *steps = np.diff(times)
    return DecodePoint(len(tokens), _rate(1, median(steps)), _rate(len(missing), prefill))


def _rate(count: int, seconds: float) -> float:
    return count / max(float(seconds), 1e-9)  # a clock may be too coarse for a tiny model


def _predicted(last: DecodePoint, length: int) -> float:
    """Seconds that the next length takes, at least."""
    return (length - last.context) / last.prefill_tok_s + STEPS / last.decode_tok_s
