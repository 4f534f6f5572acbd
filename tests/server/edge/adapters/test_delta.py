"""Changes computed from factors against the same ones as whole matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.edge.adapters.delta import Shape, Sketcher, Sum, breakeven, gram, inner, norm
from tests.server.edge.adapters.samples import LARGER, SHAPES, adapter, flat, like, normal, times


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 8))
def test_norm_and_inner_product_are_those_of_the_matrices(seed: int, rank: int, other_rank: int) -> None:
    random = np.random.default_rng(seed)
    one, other = adapter(random, rank, alpha=3.0), adapter(random, other_rank)
    assert norm(one) == pytest.approx(np.linalg.norm(flat(one)), rel=1e-6)
    assert inner(one, other) == pytest.approx(flat(one) @ flat(other), rel=1e-6, abs=1e-6 * norm(one) * norm(other))


def test_matrices_that_only_one_changes_add_nothing() -> None:
    random = np.random.default_rng(0)
    name, *others = SHAPES
    one = adapter(random, 4, shapes={name: SHAPES[name]})
    other = adapter(random, 4, shapes={each: SHAPES[each] for each in others})
    assert inner(one, other) == 0.0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    ranks=st.lists(st.integers(1, 10), min_size=1, max_size=12),
    stacked=st.sampled_from([breakeven, min]),
)
def test_a_sum_is_truncated_to_the_best_of_every_rank(
    seed: int, shape: Shape, ranks: list[int], stacked: Callable[[Shape], int]
) -> None:
    random = np.random.default_rng(seed)
    total = Sum(shape, stacked(shape))
    whole = np.zeros(shape)
    for rank in ranks:
        b, a = normal(random, shape[0], rank), normal(random, rank, shape[1])
        total.add(b, a)
        whole += b.astype(np.float64) @ a
    values = np.linalg.svd(whole, compute_uv=False)
    b, a = total.truncated(8)
    size = np.linalg.norm(whole)
    for rank in range(1, len(a) + 1):
        best = np.sqrt((values[rank:] ** 2).sum())
        assert np.linalg.norm(whole - b[:, :rank] @ a[:rank]) <= best + 1e-5 * size
    if len(a) < 8:  # there is no more to it
        assert np.linalg.norm(values[len(a) :]) <= 1e-5 * size
    stacked_b, stacked_a = total.stacked()
    assert np.linalg.norm(stacked_b @ stacked_a - whole) <= 1e-5 * size
    assert len(stacked_a) <= max(min(shape), sum(ranks))


def test_what_is_kept_never_takes_more_room_than_the_matrix_and_a_few_columns() -> None:
    random = np.random.default_rng(0)
    total = Sum((60, 90), breakeven((60, 90)))
    for _ in range(50):
        total.add(normal(random, 60, 8), normal(random, 8, 90))
        assert total.nbytes <= 4 * (60 * 90 + (64 + 8) * (60 + 90))


def test_a_sum_of_nothing_is_nothing_and_not_nan() -> None:
    total = Sum((4, 6), 2)
    total.add(np.zeros((4, 2), np.float32), np.zeros((2, 6), np.float32))
    b, a = total.truncated(2)
    assert not b.any()
    assert not a.any()


@pytest.mark.parametrize("rank", [1, 50])
def test_factors_of_another_shape_are_refused_whether_few_or_many_came_before(rank: int) -> None:
    random = np.random.default_rng(0)
    total = Sum((8, 10), 8)
    total.add(normal(random, 8, rank), normal(random, rank, 10))
    for b, a in (((9, 2), (2, 10)), ((8, 2), (2, 11)), ((8, 3), (2, 10))):
        with pytest.raises(ValueError, match="don't make a matrix"):
            total.add(normal(random, *b), normal(random, *a))


def test_sketches_tell_cosines_within_a_few_percent() -> None:
    random = np.random.default_rng(0)
    common = adapter(random, 8, shapes=LARGER)
    adapters = [like(random, common, share, rank=rank) for share in (0.0, 0.3, 0.9) for rank in (4, 8)]
    sketches = [Sketcher(7)(each) for each in adapters]  # each sketcher by itself: the seed is all that matters
    vectors = np.array([flat(each) for each in adapters])
    lengths = np.linalg.norm(vectors, axis=1)
    exact = vectors @ vectors.T / np.outer(lengths, lengths)
    sketched = gram(sketches) / np.outer(lengths, lengths)
    assert np.abs(sketched - exact).max() < 0.15
    assert np.abs(sketched - exact).mean() < 0.05


def test_a_sketch_is_linear() -> None:
    one = adapter(np.random.default_rng(0), 4)
    products = gram([Sketcher(0)(one), Sketcher(0)(times(one, -3.0))])
    assert products[0, 1] == pytest.approx(-3.0 * products[0, 0])
    assert products[1, 1] == pytest.approx(9.0 * products[0, 0])
