"""What training makes of lessons (agent/adapt/train.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest
import torch

from agent.adapt import train as training
from agent.adapt.below import Below
from agent.adapt.checkpoint import Checkpoint
from agent.adapt.factors import Trained, beginning, resized
from agent.adapt.lesson import Lesson, Target
from agent.adapt.losses import sparse_kl
from agent.adapt.noise import is_frozen
from agent.adapt.prepare import prepare, with_kept
from agent.adapt.recipe import Progress, Recipe
from agent.adapt.torch_model import Base, distributions
from agent.adapt.train import batches, gradients, train
from models.adapter import Adapter, Factors
from protocol.errors import BadAdapter, TrainingError
from tests.models.tiny import LAYERS, VOCAB, Tiny

RECIPE = Recipe(rank=4, alpha=8.0, modules=("attn_q", "attn_v"), layers=0, epochs=20, batch=4, rate=1e-2)
TEXTS = [[(7 * n + 3 * at) % 80 for at in range(5 + n % 4)] for n in range(8)]
ALL = range(VOCAB)

Struct = TypeVar("Struct", bound=msgspec.Struct)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.load(Tiny("llama").write(tmp_path_factory.mktemp("tiny") / "tiny.gguf"), 1, bfloat16=False)


def labelled(texts: Sequence[list[int]] = TEXTS) -> list[Lesson]:
    """After each text comes 90."""
    return [Lesson([*text, 90], [Target(len(text), "label", [90])], "example") for text in texts]


def clouded(ids: list[int], p: list[float]) -> list[Lesson]:
    return [Lesson([*text, ids[0]], [Target(len(text), "cloud", ids, p)], "cloud") for text in TEXTS]


def same(one: Adapter, other: Adapter) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        np.array_equal(f.a, other.factors[name].a) and np.array_equal(f.b, other.factors[name].b)
        for name, f in one.factors.items()
    )


def changes(adapter: Adapter) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {name: adapter.alpha / f.rank * f.b @ f.a for name, f in adapter.factors.items()}


def test_labels_are_learned(base: Base) -> None:
    told: list[Progress] = []
    adapter = train(base, labelled(), RECIPE, tell=told.append)
    assert distributions(base, None, TEXTS, ALL)[:, 90].mean() < 0.1
    assert distributions(base, adapter, TEXTS, ALL)[:, 90].min() > 0.9
    assert (adapter.model, adapter.architecture, adapter.alpha, adapter.rank) == (base.fingerprint, "llama", 8.0, 4)
    assert set(adapter.factors) == {f"blk.{n}.{kind}" for n in range(LAYERS) for kind in ("attn_q", "attn_v")}
    assert [progress.step for progress in told] == [*range(1, 41), 40]
    assert (told[-1].stage, told[-1].steps, told[-1].eta_s, told[-1].left_out) == ("done", 40, 0.0, 0)
    assert told[-1].loss < 0.2 < told[0].loss
    assert told[-1].examples_per_s > 0
    assert told[-1].rss_mb > 10


def test_of_the_cloud_s_distribution_the_tail_is_learned_too(base: Base) -> None:
    """What is not named keeps its share: 40 % here, in the model's own proportions."""
    adapter = train(base, clouded([90, 91], [0.4, 0.2]), changed(RECIPE, epochs=40))
    x = distributions(base, adapter, TEXTS, ALL)
    assert np.allclose(x[:, 90], 0.4, atol=0.1)
    assert np.allclose(x[:, 91], 0.2, atol=0.1)
    assert np.allclose(np.delete(x, [90, 91], 1).sum(1), 0.4, atol=0.1)


def test_steps_that_are_kept_move_less(base: Base) -> None:
    def lessons(kept: bool) -> list[Lesson]:
        middle = [Target(3, "kept")] if kept else []
        return [changed(one, targets=[*middle, *one.targets]) for one in labelled()]

    def moved(weight: float) -> float:
        adapter = train(base, lessons(kept=weight > 0), changed(RECIPE, kept_weight=weight))
        bare, now = (distributions(base, one, [text[:3] for text in TEXTS], ALL) for one in (None, adapter))
        assert distributions(base, adapter, TEXTS, ALL)[:, 90].min() > 0.5
        return float((bare * np.log(bare / now)).sum(1).mean())

    assert moved(1.0) < 0.3 * moved(0.0)


def test_what_is_kept_is_the_bare_model_s(base: Base) -> None:
    lesson = Lesson([*TEXTS[0], 90], [Target(2, "kept"), Target(4, "label", [7])], "cloud", weight=3.0)
    recipe = Recipe(kept_weight=0.5)
    read: list[None] = []
    (example,) = with_kept(base, prepare(base, [lesson], recipe), recipe, lambda: read.append(None))
    x = distributions(base, None, [TEXTS[0][:2]], ALL)[0]
    assert np.allclose(x[example.ids[0]], example.p[0], atol=1e-4)
    assert example.ids[1, 0] == 7
    assert example.p[1].tolist() == [1.0] + [0.0] * 31
    assert example.weights.tolist() == [1.5, 3.0]
    assert example.tokens == TEXTS[0][:4]  # what comes after the last target tells nothing
    assert len(read) == 1


def test_a_lesson_counts_by_its_weight(base: Base) -> None:
    torn = [changed(one, weight=w) for w, one in zip((1.0, 100.0), (labelled()[0], *told_otherwise()), strict=True)]
    adapter = train(base, torn, changed(RECIPE, epochs=30))
    x = distributions(base, adapter, TEXTS[:1], ALL)[0]
    assert x[91] > 0.9 > 0.05 > x[90]


def told_otherwise() -> list[Lesson]:
    return [Lesson([*TEXTS[0], 91], [Target(len(TEXTS[0]), "label", [91])], "correction")]


def test_the_gradient_is_that_of_the_whole_batch_however_it_is_passed(base: Base) -> None:
    """Lessons in passes of their own, logits a few at a time: one gradient, that of the plain formula."""
    lessons = [Lesson([*text, 90], [Target(at, "label", [90]) for at in range(1, 5)], "example") for text in TEXTS]

    def gradient(tokens: int) -> tuple[float, torch.Tensor]:
        recipe = changed(RECIPE, tokens=tokens)
        trained = Trained(begun(base), recipe)
        with base.changed(trained.lows):
            loss = gradients(base, prepare(base, lessons, recipe), recipe, Below(base, trained.lows))
        return loss, trained._grads

    loss, at_once = gradient(4096)
    assert gradient(16)[0] == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(gradient(16)[1], at_once, atol=1e-6)
    trained = Trained(begun(base), RECIPE)
    with base.changed(trained.lows):
        plain = torch.stack([_plain(base, lesson) for lesson in lessons]).mean()
        plain.backward()
    assert plain.item() == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(trained._grads, at_once, atol=1e-6)
    assert at_once.abs().max() > 1e-4


def begun(base: Base) -> dict[str, Factors]:
    """Factors of which both halves have a gradient."""
    made = beginning(base, RECIPE, None)
    return {name: Factors(f.a, np.full_like(f.b, 0.01)) for name, f in made.items()}


def _plain(base: Base, lesson: Lesson) -> torch.Tensor:
    logits = base.logits(base.final(base.forward(torch.tensor([lesson.tokens]))[0]))
    at = [target.position - 1 for target in lesson.targets]
    ids = torch.tensor([target.ids for target in lesson.targets])
    return sparse_kl(logits[at], ids, torch.ones(len(at), 1)).mean()


def test_the_same_seed_gives_the_same_adapter(base: Base) -> None:
    recipe = changed(RECIPE, epochs=2)
    assert same(train(base, labelled(), recipe), train(base, labelled(), recipe))
    assert not same(train(base, labelled(), recipe), train(base, labelled(), changed(recipe, seed=1)))


def test_in_bfloat16_it_learns_too(tmp_path: Path) -> None:
    base = Base.load(Tiny("qwen2").write(tmp_path / "tiny.gguf"), 1, bfloat16=True)
    adapter = train(base, labelled(), RECIPE)
    assert distributions(base, adapter, TEXTS, ALL)[:, 90].min() > 0.9
    assert adapter.factors["blk.0.attn_q"].a.dtype == np.float32


def test_only_b_learns_where_a_is_frozen(base: Base) -> None:
    """And a is everybody's, also where it starts from an adapter of another rank."""
    adapter = train(base, labelled(), changed(RECIPE, freeze_a=True))
    assert is_frozen(adapter)
    assert all(np.abs(factors.b).max() > 0 for factors in adapter.factors.values())
    for rank in (2, 8):
        still = changed(RECIPE, freeze_a=True, rank=rank, alpha=rank * 3.0, epochs=1, rate=1e-12)
        other = train(base, labelled()[:4], still, adapter)
        assert is_frozen(other)
        for name, factors in other.factors.items():
            told = np.float32(2.0 / 3.0) * adapter.factors[name].b[:, :rank]
            assert np.allclose(factors.b[:, :4], told, atol=1e-6)
    with pytest.raises(BadAdapter, match="another A"):
        train(base, labelled(), changed(RECIPE, freeze_a=True), train(base, labelled(), changed(RECIPE, epochs=1)))
    assert distributions(base, adapter, TEXTS, ALL)[:, 90].mean() > 0.3


def test_top_layers_alone(base: Base) -> None:
    adapter = train(base, labelled(), changed(RECIPE, epochs=1, layers=1, modules=("ffn_down",)))
    assert set(adapter.factors) == {f"blk.{LAYERS - 1}.ffn_down"}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (6, 3.0), (64, 1.0)])
def test_it_starts_from_an_adapter_of_the_same_or_a_lower_rank(base: Base, rank: int, alpha: float) -> None:
    first = train(base, labelled(), RECIPE)
    then = train(base, labelled(), changed(RECIPE, epochs=1, rate=1e-12, rank=rank, alpha=alpha), first)
    for name, change in changes(first).items():
        assert np.allclose(changes(then)[name], change, atol=1e-5)
    assert then.rank == rank


def test_of_a_higher_rank_it_keeps_the_nearest(base: Base) -> None:
    random = np.random.default_rng(0)
    learned = Factors(random.normal(size=(6, 9)).astype(np.float32), random.normal(size=(7, 6)).astype(np.float32))
    made = resized(learned, 0.5, Factors(np.zeros((2, 9), np.float32), np.zeros((7, 2), np.float32)))
    u, s, v = np.linalg.svd(0.5 * learned.b @ learned.a)
    assert np.allclose(made.b @ made.a, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    assert made.a.dtype == made.b.dtype == np.float32
    assert made.a.shape == (2, 9)


def test_what_the_start_has_beside_the_recipe_s_matrices_is_not_lost(base: Base) -> None:
    first = train(base, labelled(), changed(RECIPE, modules=("ffn_down",)))
    then = train(base, labelled(), changed(RECIPE, epochs=1), first)
    assert set(first.factors) < set(then.factors)


def test_an_adapter_for_another_model_is_no_start(base: Base) -> None:
    first = train(base, labelled(), changed(RECIPE, epochs=1))
    with pytest.raises(BadAdapter, match="another model"):
        train(base, labelled(), RECIPE, replace(first, model="b" * 64))
    wide = {name: Factors(np.ones((2, 7), np.float32), f.b[:, :2]) for name, f in first.factors.items()}
    with pytest.raises(BadAdapter, match="shape"):
        train(base, labelled(), RECIPE, replace(first, factors=wide))


def test_a_matrix_that_the_model_does_not_have_is_named(base: Base) -> None:
    with pytest.raises(TrainingError, match=r"blk\.0\.attn_none"):
        train(base, labelled(), changed(RECIPE, modules=("attn_none",)))


def test_lessons_that_cannot_be_learned_are_left_out_and_counted(base: Base) -> None:
    good = labelled()
    bad = [
        Lesson([1, VOCAB, 90], [Target(2, "label", [90])], "example"),  # a token that the model does not have
        Lesson([1, 2, 90], [Target(2, "label", [VOCAB])], "example"),
        Lesson([1, 2, 90], [Target(3, "label", [90])], "example"),  # beyond the end
        Lesson([1, 2, 90], [Target(0, "label", [90])], "example"),
        Lesson([], [], "example"),
        Lesson([1] * 600, [Target(599, "label", [90])], "example"),  # beyond the context
        Lesson([1] * 60, [Target(59, "label", [90])], "example"),  # beyond a pass
        Lesson([1, 2, 90], [Target(2, "cloud", [90], [math.nan])], "cloud"),
    ]
    told: list[Progress] = []
    recipe = changed(RECIPE, epochs=2, tokens=50)
    adapter = train(base, [*bad[:4], *good, *bad[4:]], recipe, tell=told.append)
    assert told[-1].left_out == len(bad)
    assert same(adapter, train(base, good, recipe))
    with pytest.raises(TrainingError, match="none of 8 lessons"):
        train(base, bad, recipe)
    with pytest.raises(TrainingError, match="none of 0 lessons"):
        train(base, [], recipe)


def test_a_step_without_a_finite_loss_is_skipped(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def broken(*given: object) -> float:
        nonlocal calls
        calls += 1
        loss = gradients(*given)  # type: ignore[arg-type]
        return math.nan if calls == 3 else loss

    monkeypatch.setattr(training, "gradients", broken)
    adapter = train(base, labelled(), RECIPE)
    assert calls == 40
    assert distributions(base, adapter, TEXTS, ALL)[:, 90].min() > 0.5


def test_it_stops_where_the_loss_stays_without_a_value(tmp_path: Path) -> None:
    """And leaves the last good state."""
    base = Base.load(Tiny("llama").write(tmp_path / "tiny.gguf"), 1, bfloat16=False)
    checkpoint = Checkpoint(tmp_path / "checkpoint", every=2)
    told: list[Progress] = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        if progress.step == 5:
            base.layers[0].ffn_norm.fill_(math.nan)

    with pytest.raises(TrainingError, match="no finite loss"):
        train(base, labelled(), RECIPE, None, checkpoint, tell)
    assert told[-1].step == 12  # the eighth bad one is not told
    stored = np.load(checkpoint.path, allow_pickle=False)
    assert int(stored["step"]) == 4
    assert np.isfinite(stored["values"]).all()


def test_an_order_of_batches_has_each_lesson_once_an_epoch() -> None:
    lengths = [5, 80, 7, 6, 90, 85, 8, 9, 70, 4]
    order = batches(lengths, Recipe(batch=4, seed=1))
    for _ in range(3):
        assert sorted(index for _ in range(3) for index in next(order)) == list(range(10))
    first = next(batches(lengths, Recipe(batch=5, seed=1)))
    assert max(lengths[index] for index in first) < 10 or min(lengths[index] for index in first) >= 9


def changed(struct: Struct, **changes: object) -> Struct:
    return msgspec.structs.replace(struct, **changes)
