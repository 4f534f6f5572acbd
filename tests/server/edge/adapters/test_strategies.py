"""What every strategy makes of a fleet, against the exact weighted mean of the changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import MOST_RANK, Adapter, Factors, read, write
from protocol.errors import BadAdapter
from server.edge.adapters import Contribution, Strategy, aggregate, strategies
from tests.server.edge.adapters.samples import (
    MODEL,
    SHAPES,
    adapter,
    assert_same,
    contributions,
    dense,
    flat,
    fleets,
    mean,
    normal,
    times,
)

FULL = 20  # no matrix of SHAPES has a higher rank
ALL: tuple[Strategy, ...] = ("flexlora", "flora", "hetlora", "fedsa", "ffa")


def frozen_a(random: np.random.Generator, ranks: list[int]) -> list[Adapter]:
    """The same A on all, those of lower rank with its first rows."""
    start = adapter(random, max(ranks))
    return [
        replace(
            start,
            alpha=alpha,
            factors={
                name: Factors(each.a[:rank], normal(random, len(each.b), rank)) for name, each in start.factors.items()
            },
        )
        for rank, alpha in zip(ranks, (4.0, 16.0, 8.0, 16.0), strict=False)
    ]


@given(fleets(same_rank=True), st.sampled_from([1.0, 16.0]))
def test_of_one_rank_flora_and_full_flexlora_are_the_exact_mean(told: list[Contribution], alpha: float) -> None:
    exact = mean(told)
    assert_same(dense(aggregate(told, "flexlora", [FULL], alpha)[FULL]), exact)
    assert_same(dense(aggregate(told, "flora", [4], alpha)[4]), exact)


@given(fleets(), st.sampled_from([1.0, 16.0]))
def test_different_ranks_and_alphas_are_folded_in(told: list[Contribution], alpha: float) -> None:
    exact = mean(told)
    assert_same(dense(aggregate(told, "flexlora", [FULL], alpha)[FULL]), exact)
    assert_same(dense(aggregate(told, "flora", [4], alpha)[4]), exact)


@given(fleets(), st.sets(st.integers(1, 8), min_size=1))
def test_flexlora_gives_every_rank_its_best_approximation(told: list[Contribution], ranks: set[int]) -> None:
    exact = mean(told)
    made = aggregate(told, "flexlora", sorted(ranks), 16.0)
    assert made.keys() == ranks
    for rank, of_rank in made.items():
        for name, matrix in dense(of_rank).items():
            values = np.linalg.svd(exact[name], compute_uv=False)
            assert of_rank.factors[name].rank <= rank
            assert np.linalg.norm(matrix - exact[name]) <= np.linalg.norm(values[rank:]) + 1e-4 * values[0]


@pytest.mark.parametrize("strategy", ALL[:3])
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8), weight=st.floats(1e-3, 1e6))
def test_one_device_gets_back_what_it_sent(strategy: Strategy, seed: int, rank: int, weight: float) -> None:
    sent = adapter(np.random.default_rng(seed), rank, alpha=12.0)
    got = aggregate(contributions([sent], weight), strategy, [rank], 16.0)[rank]
    assert_same(dense(got), dense(sent))
    assert (got.model, got.architecture, got.alpha, got.rank) == (MODEL, "llama", 16.0, rank)


@pytest.mark.parametrize("strategy", ALL[:4])
@given(told=fleets(), data=st.data())
@settings(max_examples=30)
def test_the_order_of_the_devices_changes_nothing(strategy: Strategy, told: list[Contribution], data: st.DataObject):
    one = aggregate(told, strategy, [4], 16.0)[4]
    other = aggregate(data.draw(st.permutations(told)), strategy, [4], 16.0)[4]
    for name in one.factors:
        np.testing.assert_array_equal(one.factors[name].a, other.factors[name].a)
        np.testing.assert_array_equal(one.factors[name].b, other.factors[name].b)


@pytest.mark.parametrize("strategy", ALL[:3])
@given(told=fleets(), by=st.floats(1e-6, 1e6))
@settings(max_examples=30)
def test_only_ratios_of_weights_matter(strategy: Strategy, told: list[Contribution], by: float) -> None:
    more = [replace(each, weight=by * each.weight) for each in told]
    one, other = (aggregate(each, strategy, [FULL], 16.0)[FULL] for each in (told, more))
    assert_same(dense(one), dense(other), within=1e-3)


def test_averaging_a_and_b_by_themselves_is_wrong() -> None:
    random = np.random.default_rng(0)
    told = contributions([adapter(random, 4), adapter(random, 4)])
    exact = mean(told)
    adapters = [each.load() for each in told]
    apart = {
        name: 4.0
        * np.mean([each.factors[name].b for each in adapters], axis=0)
        @ np.mean([each.factors[name].a for each in adapters], axis=0)
        for name in SHAPES
    }
    for name, matrix in exact.items():
        assert np.linalg.norm(apart[name] - matrix) > 0.3 * np.linalg.norm(matrix)


def test_averages_by_themselves_may_even_cancel_what_both_learned() -> None:
    """(-B)(-A) = BA: two devices that learned the same, of which nothing is left."""
    one = adapter(np.random.default_rng(0), 4)
    other = replace(one, factors={name: Factors(-each.a, -each.b) for name, each in one.factors.items()})
    told = contributions([one, other])
    assert_same(dense(aggregate(told, "flexlora", [4], 16.0)[4]), dense(one))
    assert_same(dense(aggregate(told, "flora", [4], 16.0)[4]), dense(one))
    assert not flat(aggregate(told, "hetlora", [4], 16.0)[4]).any()


def test_hetlora_pads_weighs_by_norm_and_cuts() -> None:
    random = np.random.default_rng(0)
    small, large = adapter(random, 2), times(adapter(random, 6), 3.0)
    told = contributions([small, large])
    sizes = np.array([np.linalg.norm(flat(each)) for each in (small, large)])
    p, q = sizes / sizes.sum()
    made = aggregate(told, "hetlora", [3, 6], 16.0)
    for name, (d_out, d_in) in SHAPES.items():
        a = q * large.factors[name].a
        a[:2] += p * small.factors[name].a
        b = q * 16.0 / 6 * large.factors[name].b
        b[:, :2] += p * 16.0 / 2 * small.factors[name].b
        assert (a.shape, b.shape) == ((6, d_in), (d_out, 6))
        for rank in (3, 6):
            np.testing.assert_allclose(dense(made[rank])[name], b[:, :rank] @ a[:rank], rtol=1e-3, atol=1e-3)
    exact = np.concatenate([matrix.ravel() for _, matrix in sorted(mean(told).items())])
    assert np.linalg.norm(flat(made[6]) - exact) > 0.3 * np.linalg.norm(exact)


def test_fedsa_is_the_mean_of_a_over_those_that_have_the_row_and_leaves_b_to_the_device() -> None:
    random = np.random.default_rng(0)
    one, other = adapter(random, 2), adapter(random, 4)
    broken = replace(other, factors={name: replace(each, b=each.b * np.nan) for name, each in other.factors.items()})
    made = aggregate(contributions([one, broken], [3.0, 1.0]), "fedsa", [1, 4, 8], 16.0)
    for name in SHAPES:
        a = made[4].factors[name].a
        np.testing.assert_allclose(a[:2], 0.75 * one.factors[name].a + 0.25 * other.factors[name].a[:2], atol=1e-5)
        np.testing.assert_allclose(a[2:], other.factors[name].a[2:], atol=1e-5)
        np.testing.assert_array_equal(made[1].factors[name].a, a[:1])
        assert made[8].factors[name].rank == 4
        assert made[4].factors[name].b.shape == other.factors[name].b.shape
        assert not made[4].factors[name].b.any()


@given(st.integers(0, 1000), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_ffa_is_exact_and_keeps_a(seed: int, ranks: list[int]) -> None:
    devices = frozen_a(np.random.default_rng(seed), ranks)
    told = contributions(devices, [1.0, 2.0, 3.0, 4.0][: len(devices)])
    top = aggregate(told, "ffa", [6], 16.0)[6]
    assert_same(dense(top), mean(told))
    largest = max(devices, key=lambda each: each.rank)
    for name in SHAPES:
        np.testing.assert_array_equal(top.factors[name].a, largest.factors[name].a)


def test_ffa_refuses_a_thawed_a() -> None:
    devices = frozen_a(np.random.default_rng(0), [4, 2])
    devices[1].factors["blk.0.attn_q"].a.flags.writeable = True
    thawed = devices[1].factors["blk.0.attn_q"].a.copy()
    thawed[1, 3] += 0.1
    devices[1].factors["blk.0.attn_q"] = replace(devices[1].factors["blk.0.attn_q"], a=thawed)
    with pytest.raises(BadAdapter, match="device-001"):
        aggregate(contributions(devices), "ffa", [4], 16.0)


@pytest.mark.parametrize("strategy", ALL[:3])
def test_who_alone_changes_a_matrix_has_no_more_than_its_weight_there(strategy: Strategy) -> None:
    random = np.random.default_rng(0)
    name = "blk.0.attn_q"
    adapters = [adapter(random, 4), adapter(random, 4, shapes={each: SHAPES[each] for each in SHAPES if each != name})]
    made = dense(aggregate(contributions(adapters), strategy, [FULL], 16.0)[FULL])
    assert np.linalg.norm(made[name]) < 0.7 * np.linalg.norm(dense(adapters[0])[name])


def test_sums_that_outgrow_their_room_take_more_readings_and_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    adapters = [adapter(random, rank) for rank in (2, 4, 8, 4)]
    read_times = [0] * len(adapters)

    def load(at: int) -> Adapter:
        read_times[at] += 1
        return adapters[at]

    told = [Contribution(f"device-{at}", 1.0, partial(load, at)) for at in range(len(adapters))]
    at_once = aggregate(told, "flexlora", [4], 16.0)[4]
    assert read_times == [1, 1, 1, 1]
    monkeypatch.setattr(strategies, "ROOM", 1000)
    in_turns = aggregate(told, "flexlora", [4], 16.0)[4]
    assert read_times == [5, 5, 5, 5]  # four matrices, one at a time
    assert_same(dense(in_turns), dense(at_once))


def test_flora_says_when_there_are_too_many_devices_for_a_file() -> None:
    random = np.random.default_rng(0)
    shapes = {"blk.0.attn_q": (600, 600)}
    told = contributions([adapter(random, 32, shapes=shapes) for _ in range(MOST_RANK // 32 + 1)])
    with pytest.raises(BadAdapter, match="flexlora"):
        aggregate(told, "flora", [8], 16.0)
    assert aggregate(told[:-1], "flora", [8], 16.0)[8].rank == MOST_RANK


@pytest.mark.parametrize("strategy", ALL)
def test_adapters_that_do_not_go_together_are_refused_by_name(strategy: Strategy) -> None:
    random = np.random.default_rng(0)
    right = adapter(random, 4)
    for wrong in (
        replace(right, model="6" * 64),
        replace(right, architecture="qwen2"),
        adapter(random, 4, shapes={name: (d_out + 1, d_in + 1) for name, (d_out, d_in) in SHAPES.items()}),
    ):
        with pytest.raises(BadAdapter, match="device-001"):
            aggregate(contributions([right, wrong]), strategy, [4], 16.0)


@pytest.mark.parametrize(
    ("weights", "ranks", "alpha"),
    [
        ([], [4], 16.0),
        ([0.0], [4], 16.0),
        ([float("nan")], [4], 16.0),
        ([1.0], [], 16.0),
        ([1.0], [0], 16.0),
        ([1.0], [4], 0.0),
    ],
)
def test_weights_ranks_and_alpha_are_positive(weights: list[float], ranks: list[int], alpha: float) -> None:
    one = adapter(np.random.default_rng(0), 4)
    with pytest.raises(ValueError):
        aggregate(contributions([one] * len(weights), weights), "flexlora", ranks, alpha)


def test_the_centroid_is_the_mean_direction_of_those_that_have_one() -> None:
    one = adapter(np.random.default_rng(0), 4)
    right, up = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
    devices = [replace(one, centroid=right), replace(one, centroid=up), one]
    made = aggregate(contributions(devices, [3.0, 4.0, 1.0]), "flexlora", [4], 16.0)[4]
    np.testing.assert_allclose(made.centroid, [0.6, 0.8], atol=1e-6)
    assert aggregate(contributions([one]), "flexlora", [4], 16.0)[4].centroid is None


def test_what_comes_out_is_a_file_of_the_same_change(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    made = aggregate(contributions([adapter(random, 4), adapter(random, 8)]), "flexlora", [4, FULL], 16.0)
    for rank, of_rank in made.items():
        write(of_rank, tmp_path / f"{rank}.gguf")
        assert_same(dense(read(tmp_path / f"{rank}.gguf")), dense(of_rank), within=5e-3)
