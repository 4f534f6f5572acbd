"""What leaves the device of an adapter where not all of it may."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agent.adapt.noise import ROWS, a_alone, frozen_a, frozen_start, released, secret_gauss, with_a
from models.adapter import Adapter, Factors, Floats, check_fits, parse, write
from protocol.errors import BadAdapter, TrainingError

MODEL = "ab" * 32
SHAPES = {"blk.0.attn_q": (24, 16), "blk.1.attn_v": (8, 16)}


def learned(seed: int, rank: int = 4, scale: float = 1.0) -> Adapter:
    """With the frozen A."""
    random = np.random.default_rng(seed)
    start = frozen_start(MODEL, "llama", SHAPES, rank, 8.0)
    factors = {
        name: Factors(each.a, np.float32(scale * random.normal(size=each.b.shape)))
        for name, each in start.factors.items()
    }
    return replace(start, factors=factors, centroid=np.ones(3, np.float32))


def silence(count: int) -> Floats:
    return np.zeros(count, np.float32)


def moved(one: Adapter, other: Adapter) -> float:
    """The L2 norm of the difference of all B."""
    return math.sqrt(sum(float(np.square(one.factors[n].b - other.factors[n].b).sum()) for n in one.factors))


def test_a_alone_has_the_same_a_and_nothing_else() -> None:
    own = learned(1)
    told = a_alone(own)
    assert told.centroid is None
    for name, each in told.factors.items():
        assert np.array_equal(each.a, own.factors[name].a)
        assert each.b.shape == (ROWS, 4)
        assert not each.b.any()
    with pytest.raises(BadAdapter):
        check_fits(told, SHAPES)  # nobody can attach it by mistake


def test_the_agreed_a_comes_to_the_own_b() -> None:
    own, agreed = learned(1), a_alone(replace(learned(2), model=MODEL))
    doubled = replace(agreed, factors={n: Factors(2 * each.a, each.b) for n, each in agreed.factors.items()})
    both = with_a(own, doubled)
    for name, each in both.factors.items():
        assert np.array_equal(each.b, own.factors[name].b)
        assert np.array_equal(each.a, 2 * own.factors[name].a)
    with pytest.raises(TrainingError, match="its own stays"):
        with_a(own, a_alone(learned(2, rank=8)))


def test_the_frozen_a_is_the_same_everywhere_and_survives_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    whole = frozen_a(MODEL, "blk.0.attn_q", 8, 16)
    assert np.array_equal(frozen_a(MODEL, "blk.0.attn_q", 3, 16), whole[:3])
    assert not np.array_equal(frozen_a(MODEL, "blk.1.attn_q", 8, 16), whole)
    assert np.abs(whole).max() <= 0.25
    assert stats.kstest(frozen_a(MODEL, "blk.0.attn_q", 64, 256).ravel() * 16, stats.uniform(-1, 2).cdf).pvalue > 1e-4
    write(learned(1), tmp_path / "a.gguf")
    back = parse((tmp_path / "a.gguf").read_bytes())
    released(back, None, 1.0, 1.0, silence)  # its A is still taken for the frozen one


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 10.0), st.floats(0.01, 100.0))
def test_what_is_sent_moves_by_the_clip_at_most(seed: int, clip: float, scale: float) -> None:
    agreed = learned(seed + 1)
    told = released(learned(seed, scale=scale), agreed, clip, 1.0, silence)
    assert moved(told, agreed) <= clip * 1.001
    assert told.centroid is None


def test_a_small_change_is_sent_as_it_is() -> None:
    agreed = learned(1)
    own = replace(agreed, factors={n: Factors(f.a, f.b + np.float32(0.01)) for n, f in agreed.factors.items()})
    told = released(own, agreed, 5.0, 1.0, silence)
    assert moved(told, own) < 1e-5


def test_the_agreed_adapter_of_another_rank_and_alpha_is_the_same_reference() -> None:
    low = learned(1, rank=2)
    factors = {
        n: Factors(frozen_a(MODEL, n, 4, 16), np.hstack([f.b, np.zeros_like(f.b)]) * np.float32(4.0))
        for n, f in low.factors.items()
    }
    same = Adapter(MODEL, "llama", 4.0, factors)  # 4 / 4 * (4 b) = 8 / 2 * b
    assert moved(released(same, low, 1.0, 1.0, silence), same) < 1e-4


def test_the_noise_has_the_deviation_that_is_told() -> None:
    own = frozen_start(MODEL, "llama", {"blk.0.attn_q": (400, 16)}, 8, 8.0)
    told = released(own, None, 0.5, 3.0, secret_gauss)
    drawn = told.factors["blk.0.attn_q"].b.ravel() / 1.5
    assert stats.kstest(drawn, stats.norm.cdf).pvalue > 1e-4
    again = released(own, None, 0.5, 3.0, secret_gauss)
    assert moved(told, again) > 1.0


def test_without_a_frozen_a_there_is_no_protection() -> None:
    own = learned(1)
    wrong = replace(own, factors={n: Factors(f.a + np.float32(0.1), f.b) for n, f in own.factors.items()})
    with pytest.raises(TrainingError, match="without a frozen A"):
        released(wrong, None, 1.0, 1.0, silence)
    for clip, noise in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(TrainingError, match="protect nothing"):
            released(own, None, clip, noise, silence)
