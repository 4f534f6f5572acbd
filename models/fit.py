"""Which model, with which settings, is the best that a device has the memory and the speed for.

Best is the most weights, and of equally many the most bits for each. Memory is predicted (models.footprint). Speed is
what was measured on the device; else it is an ESTIMATE, as a decode step reads all weights and all cells once:

    seconds = max(bytes of the file and the cells / bytes_s, weights / weights_s)

where the two rates are the board's (models.boards), or what the device reached with the measured model of the most
similar size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log

from models.boards import Speed
from models.footprint import Shape, cell_bytes, footprint, largest_context
from models.latency import DecodeTable

_REPACKED = ("Q4_0", "Q4_K", "IQ4_NL")  # quantisations that llama.cpp can rearrange; their names go on with _S or _M
_MB = 10**6


@dataclass(frozen=True, slots=True)
class Candidate:
    """`name`: what model.name would be; `table`: what was measured of it on the device, if it was."""

    name: str
    shape: Shape
    quantisation: str = ""
    table: DecodeTable | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """`memory`: most bytes; `tok_s`: least tokens per second with a full context; `context`: least tokens of it."""

    memory: int
    tok_s: float
    context: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The keys of [model] that matter; `threads` as it was measured, 0: one per physical core."""

    name: str
    context: int
    kv: str = "q8_0"  # half the memory of f16
    threads: int = 0
    repack: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """`memory` in bytes with these settings, `tok_s` with their context full; `problems`: why it does not fit, as
    sentences, () if it does; `changes`: options that would make it fit; `excess`: by how much it exceeds the budget, as
    a factor."""

    candidate: Candidate
    settings: Settings
    memory: int
    tok_s: float
    problems: tuple[str, ...]
    changes: tuple[str, ...]
    excess: float

    @property
    def measured(self) -> bool:
        return self.candidate.table is not None

    @property
    def fits(self) -> bool:
        return not self.problems


def fit(candidates: Sequence[Candidate], budget: Budget, speed: Speed, repack: bool) -> list[Choice]:
    """All of them, best first; the first that fits is the one to take. `speed`: of the board, used where nothing was
    measured. `repack`: its processor is faster with rearranged weights."""
    measured = [one for one in candidates if one.table is not None]
    choices = [_judge(one, budget, _speed(one, measured, budget, speed), repack) for one in candidates]
    return sorted(choices, key=_goodness, reverse=True)


def nearest(choices: Sequence[Choice]) -> Choice:
    """The one that exceeds the budget least, in proportion."""
    return min(choices, key=lambda choice: choice.excess)


def toml(choice: Choice) -> str:
    """The lines of the configuration. What only llama.cpp knows is left out for ONNX."""
    settings = choice.settings
    lines = [
        "[model]",
        f"name = {json.dumps(settings.name, ensure_ascii=False)}",
        f"context = {settings.context}",
        f"threads = {settings.threads}",
    ]
    if choice.candidate.shape.element is None:
        lines += [f'kv = "{settings.kv}"', f"repack = {str(settings.repack).lower()}"]
    return "\n".join(lines)


def needed(candidate: Candidate, budget: Budget) -> int:
    """Bytes that it takes with the budget's context."""
    return footprint(candidate.shape, _plain(candidate, budget))


def _judge(candidate: Candidate, budget: Budget, speed: Speed, repack: bool) -> Choice:
    settings = _plain(candidate, budget)
    if repack and candidate.quantisation.startswith(_REPACKED):
        settings = _repacked_if_it_fits(candidate.shape, settings, budget.memory)
    memory = footprint(candidate.shape, settings)
    tok_s = _tok_s(candidate, settings, speed)
    problems, changes = [], []
    if candidate.shape.context < budget.context:
        problems.append(f"trained for {candidate.shape.context} tokens of context, not {budget.context}")
        changes.append(f"--context {candidate.shape.context}")
    if memory > budget.memory:
        problems.append(f"too large by {ceil((memory - budget.memory) / _MB):,} MB")
        smaller = largest_context(candidate.shape, settings, budget.memory)
        changes.append(f"--memory {ceil(memory / _MB)}" + (f" or --context {smaller}" if smaller else ""))
    if tok_s < budget.tok_s:
        problems.append(f"too slow: {tok_s:.1f} of {budget.tok_s:g} tok/s")
        changes.append(f"--tok-s {_rounded_down(tok_s)}")
    excess = max(memory / max(1, budget.memory), budget.tok_s / tok_s, budget.context / candidate.shape.context)
    return Choice(candidate, settings, memory, tok_s, tuple(problems), tuple(changes), excess)


def _plain(candidate: Candidate, budget: Budget) -> Settings:
    threads = candidate.table.threads if candidate.table is not None else 0
    return Settings(candidate.name, min(budget.context, candidate.shape.context), threads=threads)


def _repacked_if_it_fits(shape: Shape, settings: Settings, memory: int) -> Settings:
    repacked = replace(settings, repack=True)
    return repacked if footprint(shape, repacked) <= memory else settings


def _tok_s(candidate: Candidate, settings: Settings, speed: Speed) -> float:
    """With the context full."""
    if candidate.table is not None:
        return candidate.table.tok_s(settings.context)
    return 1 / max(_read(candidate.shape, settings) / speed.bytes_s, candidate.shape.weights / speed.weights_s)


def _read(shape: Shape, settings: Settings) -> float:
    """Bytes that one step reads with the context full."""
    return shape.file + settings.context * cell_bytes(shape, settings)


def _speed(candidate: Candidate, measured: Sequence[Candidate], budget: Budget, speed: Speed) -> Speed:
    """What the device reached with the measured model nearest in size, of the same engine if there is one; `speed` if
    nothing was measured."""
    if not measured:
        return speed

    def distance(one: Candidate) -> tuple[bool, float]:
        other_engine = (one.shape.element is None) != (candidate.shape.element is None)
        return other_engine, abs(log(one.shape.file / candidate.shape.file))

    near = min(measured, key=distance)
    settings = _plain(near, budget)
    return Speed(_read(near.shape, settings) * _tok_s(near, settings, speed))


def _goodness(choice: Choice) -> tuple[int, float, float]:
    shape = choice.candidate.shape
    return shape.weights, shape.file * 8 / max(1, shape.weights), choice.tok_s


def _rounded_down(rate: float) -> str:
    return f"{int(rate * 10) / 10:g}" if rate >= 0.1 else f"{rate * 0.99:.2g}"
