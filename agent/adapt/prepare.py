"""Lessons as the trainer feeds them: every kind of target as a sparse distribution over the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from agent.adapt.hardware import ROWS
from agent.adapt.lesson import Lesson, Target, check
from agent.adapt.losses import likeliest
from agent.adapt.recipe import Recipe
from agent.adapt.torch_model import Base, grouped, padded
from protocol.errors import TrainingError

_KEPT = 32  # likeliest tokens of the bare model that stand for its distribution at a step to be kept


@dataclass(frozen=True, slots=True)
class Example:
    """`tokens`: up to the last target; `positions` (n,): the states that predict, each the target's position - 1;
    `ids`, `p` (n, k): what should come, -1 and 0 where a row names fewer than k; `weights` (n,); `kept` (n,): which are
    to come out as the bare model has them."""

    tokens: list[int]
    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    p: NDArray[np.float32]
    weights: NDArray[np.float32]
    kept: NDArray[np.bool_]


def prepare(base: Base, lessons: Sequence[Lesson], recipe: Recipe) -> list[Example]:
    """Without the lessons that this model cannot learn from: a token that it does not have, targets that make no
    sense, longer than its context or than a pass. Raises TrainingError if none is left."""
    longest = min(base.context, recipe.tokens)
    made = [_example(lesson, recipe) for lesson in lessons if _fits(lesson, base.vocab, longest)]
    if not made:
        raise TrainingError(
            f"none of {len(lessons)} lessons can be learned from: they are empty, for another model, "
            f"or longer than {longest} tokens"
        )
    return made


def _fits(lesson: Lesson, vocab: int, longest: int) -> bool:
    try:
        check(lesson)
    except TrainingError:
        return False
    ids = (token for target in lesson.targets for token in target.ids)
    return lesson.targets[-1].position <= longest and max(lesson.tokens) < vocab and max(ids, default=0) < vocab


def _example(lesson: Lesson, recipe: Recipe) -> Example:
    """What is taught shares the lesson's weight equally; what is kept shares kept_weight times as much."""
    targets = lesson.targets
    k = max(1, *(len(target.ids) for target in targets))
    ids, p = np.full((len(targets), k), -1, np.int64), np.zeros((len(targets), k), np.float32)
    for row, target in enumerate(targets):
        ids[row, : len(target.ids)] = target.ids
        p[row, : len(target.ids)] = _probabilities(target)
    kept = np.array([target.kind == "kept" for target in targets])
    shares = np.where(kept, recipe.kept_weight / max(1, kept.sum()), 1.0 / max(1, (~kept).sum()))
    return Example(
        tokens=lesson.tokens[: targets[-1].position],
        positions=np.array([target.position - 1 for target in targets]),
        ids=ids,
        p=p / np.maximum(1.0, p.sum(1, keepdims=True)),  # rounding may have left a sum above 1
        weights=(lesson.weight * shares).astype(np.float32),
        kept=kept,
    )


def _probabilities(target: Target) -> Sequence[float]:
    return [1.0] if target.kind == "label" else target.p


def with_kept(base: Base, made: Sequence[Example], recipe: Recipe, read: Callable[[], None]) -> list[Example]:
    """What the bare model says at the steps to be kept, written into the examples. The model must be bare; `read` is
    called after each pass."""
    filled = list(made)
    asked = [index for index, example in enumerate(made) if example.kept.any()] if recipe.kept_weight else []
    for group in grouped([len(made[index].tokens) for index in asked], recipe.tokens):
        rows = [asked[index] for index in group]
        with torch.inference_mode():
            h = base.forward(padded([made[row].tokens for row in rows]))
            for row, states in zip(rows, h, strict=True):
                filled[row] = _kept(base, made[row], states)
        read()
    return filled


def _kept(base: Base, example: Example, states: torch.Tensor) -> Example:
    at = np.flatnonzero(example.kept)
    more = ((0, 0), (0, max(0, _KEPT - example.ids.shape[1])))
    ids, p = np.pad(example.ids, more, constant_values=-1), np.pad(example.p, more)
    for begin in range(0, len(at), ROWS):
        rows = at[begin : begin + ROWS]
        top, likely = likeliest(base.logits(base.final(states[example.positions[rows]])), _KEPT)
        ids[rows, : top.shape[1]], p[rows, : top.shape[1]] = top.numpy(), likely.numpy()
    return replace(example, ids=ids, p=p)
