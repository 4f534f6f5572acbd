"""How large an adapter the hardware can train (agent/adapt/hardware.py)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from agent.adapt.hardware import (
    RANKS,
    LatencyTable,
    Point,
    Shapes,
    choose_rank,
    load_table,
    predicted_mb,
    save_table,
    trained_values,
)
from agent.adapt.recipe import Recipe
from models.boards import BOARDS
from protocol.errors import BadModelFile, TrainingError
from tests.models.tiny import LAYERS, VOCAB, WIDTH, Tiny

MODEL = "a" * 64


@pytest.fixture(scope="module")
def shapes(smollm2: Path) -> Shapes:
    return Shapes.of(smollm2)


def table(*points: Point, bfloat16: bool = False) -> LatencyTable:
    return LatencyTable(MODEL, "a processor", 2, bfloat16, points)


def predicted(shapes: Shapes, recipe: Recipe, tokens: int = 512, rows: int = 4, bfloat16: bool = False) -> float:
    return predicted_mb(shapes, recipe, tokens, rows, bfloat16)


def test_shapes_are_read_from_the_header(tmp_path: Path) -> None:
    tiny = Tiny("llama")
    shapes = Shapes.of(tiny.write(tmp_path / "tiny.gguf"))
    norms = (2 * LAYERS + 1) * WIDTH
    assert (shapes.layers, shapes.width, shapes.vocab) == (LAYERS, WIDTH, VOCAB)
    assert shapes.values == sum(weight.size for weight in tiny.weights.values()) + norms
    assert shapes.matrices["blk.1.ffn_down"] == tiny.weights["blk.1.ffn_down"].shape


def test_no_model_has_no_shapes(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    for name in ("text.gguf", "none.gguf"):
        with pytest.raises(BadModelFile, match=name):
            Shapes.of(tmp_path / name)


def test_an_adapter_s_size_is_that_of_its_factors(shapes: Shapes) -> None:
    query_and_value = Recipe(rank=8, modules=("attn_q", "attn_v"), layers=0)
    assert trained_values(shapes, query_and_value) == 460_800
    assert trained_values(shapes, changed(query_and_value, layers=3)) == 46_080
    with pytest.raises(TrainingError, match="attn_none"):
        trained_values(shapes, Recipe(modules=("attn_none",)))


def test_memory_grows_with_all_that_takes_it(shapes: Shapes) -> None:
    recipe = Recipe(rank=8, modules=("attn_q", "attn_v"), layers=0)
    least = predicted(shapes, recipe)
    more = predicted(shapes, changed(recipe, rank=64)) - least
    assert more == pytest.approx(4 * 6 * 7 * 460_800 / 2**20, rel=0.5)
    assert predicted(shapes, recipe, tokens=1024) > least + 100
    assert predicted(shapes, recipe, rows=64) > least + 20
    assert predicted(shapes, recipe, rows=64) == predicted(shapes, recipe, rows=1000)  # never more at once
    fewer = changed(recipe, modules=("attn_q",))
    assert predicted(shapes, changed(recipe, modules=("attn_q", "ffn_down"))) > predicted(shapes, fewer)
    assert predicted(shapes, changed(recipe, layers=10)) < least - 100
    assert predicted(shapes, recipe, bfloat16=True) < least - shapes.values * 2 / 2**20


def test_the_largest_rank_that_fits_memory_is_chosen(shapes: Shapes) -> None:
    recipe = Recipe(batch=4)
    for rank in RANKS:
        needed = predicted(shapes, msgspec.structs.replace(recipe, rank=rank))
        assert choose_rank(needed + 0.5, 1.0, table(), shapes, recipe, length=128) == rank
    with pytest.raises(TrainingError, match=r"adapt\.memory_mb"):
        choose_rank(100, 1.0, table(), shapes, recipe, length=128)


def test_the_largest_rank_that_fits_time_is_chosen(shapes: Shapes) -> None:
    known = table(Point(2, 4, 128, 1.0), Point(64, 4, 128, 2.0))
    recipe = Recipe(batch=4)
    assert choose_rank(1e6, 2.0, known, shapes, recipe, length=128) == 64
    assert choose_rank(1e6, 1.3, known, shapes, recipe, length=128) == 16
    assert choose_rank(1e6, 1.3, known, shapes, recipe, length=64) == 64
    assert choose_rank(1e6, 3.9, known, shapes, recipe, length=128, times=2.0) == 32
    with pytest.raises(TrainingError, match=r"adapt\.step_s"):
        choose_rank(1e6, 0.5, known, shapes, recipe, length=128)


def test_what_was_measured_is_given_back_and_replaced() -> None:
    known = table(Point(8, 4, 128, 1.0)).with_point(Point(8, 2, 128, 0.6)).with_point(Point(8, 4, 128, 1.5))
    assert len(known.points) == 2
    assert known.seconds(8, 4, 128) == 1.5
    assert known.seconds(8, 2, 128) == 0.6
    assert table().seconds(8, 4, 128) is None


def test_between_and_beyond_what_was_measured_lie_lines() -> None:
    known = table(Point(4, 4, 100, 1.0), Point(4, 4, 300, 2.0), Point(12, 4, 100, 2.0), Point(12, 4, 300, 4.0))
    assert known.seconds(4, 4, 200) == pytest.approx(1.5)
    assert known.seconds(4, 2, 100) == pytest.approx(0.5)
    assert known.seconds(4, 4, 600) == pytest.approx(4.0)
    assert known.seconds(8, 4, 100) == pytest.approx(1.5)
    assert known.seconds(20, 4, 100) == pytest.approx(3.0)
    assert known.seconds(2, 4, 100) == pytest.approx(1.0)


@given(st.integers(1, 128), st.integers(1, 64), st.integers(1, 4096), st.integers(1, 4096))
def test_longer_lessons_never_take_less(rank: int, batch: int, length: int, more: int) -> None:
    known = table(Point(4, 4, 100, 1.0), Point(4, 4, 300, 2.0), Point(12, 4, 100, 2.0), Point(12, 4, 300, 4.0))
    shorter, longer = known.seconds(rank, batch, length), known.seconds(rank, batch, length + more)
    assert shorter is not None
    assert longer is not None
    assert 0 < shorter <= longer + 1e-9


def test_a_table_is_kept_for_this_model_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    measured = load_table(path, MODEL, 2, True).with_point(Point(8, 4, 128, 1.0))
    save_table(path, measured)
    assert load_table(path, MODEL, 2, True) == measured
    assert measured.cpu
    for other in (("b" * 64, 2, True), (MODEL, 1, True), (MODEL, 2, False)):
        assert load_table(path, *other).points == ()
    save_table(path, msgspec.structs.replace(measured, cpu="another"))
    assert load_table(path, MODEL, 2, True).points == ()
    path.write_text("{")
    assert load_table(path, MODEL, 2, True).points == ()
    save_table(tmp_path / "none" / "steps.json", measured)  # nowhere to write: no error
    assert sorted(tmp_path.iterdir()) == [path]


def test_known_boards_can_train_smollm2_with_half_of_their_memory(shapes: Shapes) -> None:
    for board in BOARDS.values():
        known = table(Point(8, 4, 128, 2.5), bfloat16=board.bfloat16)
        assert choose_rank(board.memory_mb / 2, 30.0, known, shapes, Recipe(), length=128, times=board.slower) >= 8


@pytest.mark.parametrize(("rank", "length", "bfloat16"), [(8, 96, False), (32, 160, True)])
def test_training_takes_about_what_was_predicted(
    smollm2: Path, shapes: Shapes, rank: int, length: int, bfloat16: bool
) -> None:
    """Two cases of `python -m agent.adapt.measure`, each in a process of its own."""
    command = [sys.executable, "-m", "agent.adapt.measure", str(smollm2), "1", str(rank), str(length)]
    said = subprocess.run([*command, str(int(bfloat16))], check=True, stdout=subprocess.PIPE).stdout
    peak, seconds = map(float, said.split())
    recipe = Recipe(rank=rank)
    tokens = recipe.batch * length
    assert predicted_mb(shapes, recipe, tokens, recipe.batch, bfloat16) == pytest.approx(peak, rel=0.2)
    assert seconds > 0


def test_choosing_needs_no_torch() -> None:
    code = "import sys, agent.adapt.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_model_without_layers_to_adapt_is_named(shapes: Shapes) -> None:
    with pytest.raises(TrainingError, match=r"blk\.29\.attn_q"):
        trained_values(replace(shapes, matrices={}), Recipe(layers=1))
