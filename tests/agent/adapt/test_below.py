"""What lies below the adapted layers is computed once, and nothing else changes by that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from agent.adapt import below as module
from agent.adapt.below import Below
from agent.adapt.factors import Trained, beginning
from agent.adapt.lesson import Lesson, Target
from agent.adapt.prepare import prepare
from agent.adapt.recipe import Recipe
from agent.adapt.torch_model import Base, padded
from agent.adapt.train import train
from tests.models.tiny import LAYERS, Tiny

RECIPE = Recipe(rank=4, alpha=8.0, modules=("attn_q", "ffn_down"), layers=1, epochs=4, batch=3, rate=1e-2)
LESSONS = [
    Lesson([*text, 90], [Target(len(text), "label", [90])], "example")
    for text in ([(7 * n + 3 * at) % 80 for at in range(5 + n % 4)] for n in range(8))
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.load(Tiny("llama").write(tmp_path_factory.mktemp("tiny") / "tiny.gguf"), 1, bfloat16=False)


@pytest.fixture
def passes(base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each pass went through, lowest layers only."""
    seen: list[int] = []
    through = base.through

    def counted(h: torch.Tensor, first: int, end: int) -> torch.Tensor:
        if first == 0:
            seen.append(end)
        return through(h, first, end)

    monkeypatch.setattr(base, "through", counted)
    return seen


def test_the_lower_layers_read_each_lesson_once(base: Base, passes: list[int]) -> None:
    train(base, LESSONS, RECIPE)
    assert passes == [LAYERS - 1] * len(LESSONS)


def test_without_room_they_read_it_in_each_epoch_with_the_same_result(
    base: Base, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = train(base, LESSONS, RECIPE)
    once = len(passes)
    monkeypatch.setattr(module, "KEPT_BELOW", 0)
    anew = train(base, LESSONS, RECIPE)
    assert len(passes) - once == once * RECIPE.epochs
    for name, factors in kept.factors.items():
        assert np.array_equal(factors.a, anew.factors[name].a)
        assert np.array_equal(factors.b, anew.factors[name].b)


def test_the_states_are_those_of_the_whole_model(base: Base, tmp_path: Path) -> None:
    trained = Trained(beginning(base, RECIPE, None), RECIPE)
    examples = prepare(base, LESSONS, RECIPE)
    below = Below(base, trained.lows)
    whole = base.forward(padded([example.tokens for example in examples]))
    made = base.through(below.states(examples), below.first, LAYERS)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        assert torch.allclose(made[row, :n], whole[row, :n], atol=1e-5)


def test_a_start_that_changes_lower_layers_is_trained_there_too(base: Base) -> None:
    """Nothing that an adapter changes may be taken from the bare model's states."""
    first = train(base, LESSONS, Recipe(rank=4, alpha=8.0, layers=0, epochs=2, rate=1e-2))
    trained = Trained(beginning(base, RECIPE, first), RECIPE)
    assert Below(base, trained.lows).first == 0
