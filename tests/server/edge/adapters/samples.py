"""Small adapters to aggregate, and what they change as whole matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.adapter import Adapter, Factors
from server.edge.adapters import Contribution

MODEL = "5" * 64
_OF_A_LAYER = (("attn_q", (12, 16)), ("ffn_up", (20, 9)))
SHAPES = {f"blk.{layer}.{name}": shape for layer in (0, 1) for name, shape in _OF_A_LAYER}
LARGER = {f"blk.{layer}.attn_{of}": (width, 96) for layer in range(4) for of, width in (("q", 96), ("v", 32))}

Shapes = Mapping[str, tuple[int, int]]


def adapter(random: np.random.Generator, rank: int, alpha: float = 16.0, shapes: Shapes = SHAPES) -> Adapter:
    factors = {
        name: Factors(normal(random, rank, d_in), normal(random, d_out, rank)) for name, (d_out, d_in) in shapes.items()
    }
    return Adapter(MODEL, "llama", alpha, factors)


def normal(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, np.float32)


def like(
    random: np.random.Generator, common: Adapter, share: float, spread: float = 0.3, rank: int | None = None
) -> Adapter:
    """One that started from the same A and learned the same task: `share` of its B is common's."""
    rank = rank or common.rank
    factors = {}
    for name, of in common.factors.items():
        a, b = of.a[:rank], of.b[:, :rank]
        own = np.float32((1.0 - share) ** 0.5) * normal(random, *b.shape)
        factors[name] = Factors(a + np.float32(spread) * normal(random, *a.shape), np.float32(share**0.5) * b + own)
    return replace(common, factors=factors)


def times(of: Adapter, by: float) -> Adapter:
    return replace(of, factors={name: replace(each, b=np.float32(by) * each.b) for name, each in of.factors.items()})


def contributions(
    adapters: Sequence[Adapter], weights: float | Sequence[float] = 1.0, prefix: str = "device"
) -> list[Contribution]:
    by = [weights] * len(adapters) if isinstance(weights, float | int) else weights
    return [
        Contribution(f"{prefix}-{at:03}", weight, lambda each=each: each)
        for at, (each, weight) in enumerate(zip(adapters, by, strict=True))
    ]


def dense(of: Adapter) -> dict[str, NDArray[np.float64]]:
    """Delta W by matrix."""
    return {
        name: of.alpha / len(each.a) * each.b.astype(np.float64) @ each.a.astype(np.float64)
        for name, each in of.factors.items()
    }


def flat(of: Adapter) -> NDArray[np.float64]:
    """Delta W as one vector."""
    return np.concatenate([matrix.ravel() for _, matrix in sorted(dense(of).items())])


def mean(told: Sequence[Contribution]) -> dict[str, NDArray[np.float64]]:
    """sum p_k Delta W_k, the plain way. A matrix that a device does not have is unchanged by it."""
    total = sum(each.weight for each in told)
    summed: dict[str, NDArray[np.float64]] = {}
    for each in told:
        for name, matrix in dense(each.load()).items():
            summed[name] = summed.get(name, 0.0) + each.weight / total * matrix
    return summed


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any], within: float = 1e-4) -> None:
    """`within`: of the largest value. Factors are float32."""
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0.0, atol=within * max(1e-30, abs(other[name]).max()))


@st.composite
def fleets(draw: st.DrawFn, same_rank: bool = False) -> list[Contribution]:
    """One to six devices of different (or the same) rank, alpha and weight."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = st.integers(1, 8)
    ranks = st.just(draw(rank)) if same_rank else rank
    alphas = st.just(16.0) if same_rank else st.sampled_from([1.0, 8.0, 16.0, 20.5])
    devices = draw(st.lists(st.tuples(ranks, alphas, st.floats(0.1, 100.0)), min_size=1, max_size=6))
    made = [adapter(random, rank, alpha) for rank, alpha, _ in devices]
    return contributions(made, [weight for _, _, weight in devices])
