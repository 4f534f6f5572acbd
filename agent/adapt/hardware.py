"""How large an adapter this hardware can train: memory predicted from the shapes, step time measured on the device.

The largest r in RANKS such that (in bytes)

    M_runtime + M_base + M_act + M_head + M_below + M_LoRA(r) * (1 + 1 + 2 + 2)  <=  what training may take
    T[r, batch, length]                                                <=  what a step may take

- M_base = w * (all weights), w = 2 in bfloat16 and 4 in float32.
- M_act = w * G * tokens * sum over the layers from the lowest adapted one of what autograd keeps of a token: the two
  residual states, q, k and v, gate and up, and the inputs of changed matrices (`_kept`). `tokens` are those of one
  pass, padding included. G is what the allocator and a layer's way back add, measured.
- M_head = 4 * 5 * rows * V: logits exist for at most ROWS positions at a time; five arrays of them on the way back.
- M_LoRA(r) = 4 * sum of r (d_in + d_out): the weights, 1 gradient, Adam's 2 moments, and 2 for the update under way.
- M_below = KEPT_BELOW, where only top layers are adapted.
- M_runtime: the interpreter, torch and its compiled kernels, measured.

The measured constants are of x86-64 with torch 2.13; `python -m agent.adapt.measure MODEL` prints predicted against
measured for a machine. T is a `LatencyTable`, measured on the device itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from agent.adapt.recipe import Recipe
from models.boards import processor
from models.gguf_header import DAMAGED, read_contents
from protocol.errors import BadModelFile, TrainingError

ARCHITECTURES = frozenset({"llama", "qwen2"})  # that can be trained (torch_model.py)
RANKS = (2, 4, 8, 16, 32, 64)
ROWS = 64
"""Positions whose logits are in memory at once."""

KEPT_BELOW = 64 << 20
"""Bytes of hidden states that are kept of the layers below the lowest adapted one (agent/adapt/below.py)."""

_RUNTIME_MB = {True: 360.0, False: 325.0}  # by bfloat16: its kernels are compiled for each shape
_GROWTH = {True: 1.5, False: 1.4}  # G
_LOGITS = 5
_MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of a model file. `values`: of all weights; `matrices`: (d_out, d_in) by name without ".weight"."""

    architecture: str
    layers: int
    width: int
    vocab: int
    values: int
    matrices: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, path: Path) -> Shapes:
        """From the header alone. Raises BadModelFile."""
        try:
            with path.open("rb") as file:
                contents = read_contents(file)
            architecture = contents.values["general.architecture"]
            shapes = {tensor.name.removesuffix(".weight"): tensor.shape for tensor in contents.tensors}
            return cls(
                architecture=architecture,
                layers=contents.values[f"{architecture}.block_count"],
                width=contents.values[f"{architecture}.embedding_length"],
                vocab=shapes["token_embd"][0],
                values=sum(int(np.prod(shape)) for shape in shapes.values()),
                matrices={name: (s[0], s[1]) for name, s in shapes.items() if len(s) == 2 and name.startswith("blk.")},
            )
        except OSError as error:
            raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
        except DAMAGED:
            raise BadModelFile(f"{path}: not a GGUF model, or its header is damaged") from None


def predicted_mb(shapes: Shapes, recipe: Recipe, tokens: int, rows: int, bfloat16: bool) -> float:
    """Peak memory of the training process in MB (2^20 bytes). `tokens`: of the largest pass, padding included;
    `rows`: targets in it."""
    size = 2 if bfloat16 else 4
    first = max(0, shapes.layers - recipe.layers) if recipe.layers else 0
    act = sum(_kept(shapes, recipe, layer, bfloat16) for layer in range(first, shapes.layers))
    parts = (
        size * shapes.values,
        size * _GROWTH[bfloat16] * tokens * act,
        4 * _LOGITS * min(rows, ROWS) * shapes.vocab,
        4 * 6 * trained_values(shapes, recipe),
        KEPT_BELOW if first else 0,
    )
    return _RUNTIME_MB[bfloat16] + sum(parts) / _MB


def trained_values(shapes: Shapes, recipe: Recipe) -> int:
    """Of both factors of every adapted matrix. Raises TrainingError if the model has no such matrix."""
    first = max(0, shapes.layers - recipe.layers) if recipe.layers else 0
    names = [f"blk.{layer}.{kind}" for layer in range(first, shapes.layers) for kind in recipe.modules]
    try:
        return recipe.rank * sum(sum(shapes.matrices[name]) for name in names)
    except KeyError as missing:
        raise TrainingError(f"the model has no matrix {missing.args[0]} to adapt") from None


def _kept(shapes: Shapes, recipe: Recipe, layer: int, bfloat16: bool) -> int:
    """Values per token that autograd keeps of a layer until the way back."""

    def width_of(kind: str, side: int) -> int:
        return shapes.matrices[f"blk.{layer}.{kind}"][side]

    changed = set(recipe.modules)
    heads = width_of("attn_q", 0) + 2 * width_of("attn_k", 0)
    kept = 2 * shapes.width + heads + 2 * width_of("ffn_gate", 0) + recipe.rank * len(changed)
    if not bfloat16:
        kept += width_of("attn_q", 0)  # torch's own attention keeps its output too
    for together in ({"attn_q", "attn_k", "attn_v"}, {"attn_output"}, {"ffn_gate", "ffn_up"}, {"ffn_down"}):
        if read := changed & together:
            kept += width_of(min(read), 1)  # the input that these share
    return kept


class Point(msgspec.Struct, frozen=True):
    """One measurement: a step over `batch` lessons of `length` tokens took `seconds`."""

    rank: int
    batch: int
    length: int
    seconds: float


class LatencyTable(msgspec.Struct, frozen=True):
    """Step times of one model on one machine. `model`: the file's fingerprint."""

    model: str
    cpu: str
    threads: int
    bfloat16: bool
    points: tuple[Point, ...] = ()

    def with_point(self, point: Point) -> LatencyTable:
        """Takes the place of an older measurement of the same."""
        same = (point.rank, point.batch, point.length)
        others = tuple(old for old in self.points if (old.rank, old.batch, old.length) != same)
        return msgspec.structs.replace(self, points=(*others, point))

    def seconds(self, rank: int, batch: int, length: int) -> float | None:
        """Along lines between what was measured, over tokens and then over ranks; beyond it, in proportion to tokens
        and along the last two ranks' line. None if nothing was measured."""
        ranks = sorted({point.rank for point in self.points})
        if not ranks:
            return None
        times = [self._of_rank(known, batch * length) for known in ranks]
        if rank > ranks[-1] and len(ranks) > 1:
            slope = (times[-1] - times[-2]) / (ranks[-1] - ranks[-2])
            return times[-1] + max(0.0, slope) * (rank - ranks[-1])
        return float(np.interp(rank, ranks, times))

    def _of_rank(self, rank: int, tokens: int) -> float:
        known = sorted((point.batch * point.length, point.seconds) for point in self.points if point.rank == rank)
        most, longest = known[-1]
        if tokens >= most:
            return longest * tokens / most
        return float(np.interp(tokens, [0, *(t for t, _ in known)], [0.0, *(s for _, s in known)]))


def load_table(path: Path, model: str, threads: int, bfloat16: bool) -> LatencyTable:
    """What was measured for this model on this machine with these threads; empty if nothing was, or the file is
    damaged."""
    fresh = LatencyTable(model, processor(), threads, bfloat16)
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=LatencyTable)
    except (OSError, msgspec.DecodeError):
        return fresh
    return stored if msgspec.structs.replace(stored, points=()) == fresh else fresh


def save_table(path: Path, table: LatencyTable) -> None:
    """Whole or not at all; where it cannot be written it is measured again another time."""
    made = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            made.write_bytes(msgspec.json.encode(table))
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)


def choose_rank(
    memory_mb: float,
    step_s: float,
    table: LatencyTable,
    shapes: Shapes,
    recipe: Recipe,
    *,
    length: int,
    rows: int = 1,
    times: float = 1.0,
) -> int:
    """The largest rank that fits both budgets, for lessons of `length` tokens with `rows` targets each. `times`: how
    much slower the machine is than the table's. With an empty table memory alone decides. Raises TrainingError if even
    the smallest does not fit."""
    tokens = max(length, min(recipe.tokens, recipe.batch * length))
    for rank in reversed(RANKS):
        sized = msgspec.structs.replace(recipe, rank=rank)
        needed = predicted_mb(shapes, sized, tokens, recipe.batch * rows, table.bfloat16)
        seconds = table.seconds(rank, recipe.batch, length)
        if needed <= memory_mb and (seconds is None or seconds * times <= step_s):
            return rank
    took = "" if seconds is None else f" and {seconds * times:.1f} s for a step"
    raise TrainingError(
        f"training needs {needed:.0f} MB{took} with the smallest adapter, and may take {memory_mb:.0f} MB and "
        f"{step_s:g} s: raise adapt.memory_mb or adapt.step_s"
    )
