"""One divergence for everything that is taught (agent/adapt/losses.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.adapt.losses import likeliest, sparse_kl

VOCAB = 12

Floats = NDArray[np.float64]


def by_hand(logits: Floats, ids: list[int], p: list[float]) -> float:
    x = np.exp(logits - logits.max())
    x /= x.sum()
    tail = 1.0 - sum(p)
    outcomes = [(y, x[id]) for id, y in zip(ids, p, strict=True)] + [(tail, np.delete(x, ids).sum())]
    return float(sum(y * np.log(y / x) for y, x in outcomes if y > 1e-12))


def loss(logits: Floats, ids: list[int], p: list[float]) -> torch.Tensor:
    return sparse_kl(torch.tensor(logits)[None], torch.tensor([ids]), torch.tensor([p], dtype=torch.float64))[0]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, list[int], list[float]]:
    logits = np.array(draw(st.lists(st.floats(-8, 8), min_size=VOCAB, max_size=VOCAB)))
    ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB - 1, unique=True))
    shares = np.array(draw(st.lists(st.floats(0.01, 1), min_size=len(ids) + 1, max_size=len(ids) + 1)))
    return logits, ids, (shares / shares.sum())[:-1].tolist()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_it_is_the_divergence_over_the_named_tokens_and_none_of_these(
    case: tuple[Floats, list[int], list[float]],
) -> None:
    assert loss(*case).item() == pytest.approx(by_hand(*case), abs=1e-9)
    assert loss(*case).item() >= -1e-9


@settings(max_examples=20, deadline=None)
@given(cases())
def test_its_gradient_is_that_of_finite_differences(case: tuple[Floats, list[int], list[float]]) -> None:
    logits, ids, p = case
    of = torch.tensor(logits, requires_grad=True)
    sparse_kl(of[None], torch.tensor([ids]), torch.tensor([p], dtype=torch.float64)).sum().backward()
    for at in range(VOCAB):
        step = 1e-6 * np.eye(VOCAB)[at]
        slope = (by_hand(logits + step, ids, p) - by_hand(logits - step, ids, p)) / 2e-6
        assert of.grad is not None
        assert of.grad[at].item() == pytest.approx(slope, abs=1e-5)


def test_a_label_is_cross_entropy() -> None:
    logits = np.random.default_rng(0).normal(size=VOCAB)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits)[None], torch.tensor([3]))
    assert loss(logits, [3], [1.0]).item() == pytest.approx(expected.item())


def test_a_model_that_has_the_same_tail_is_left_as_it_is() -> None:
    """Filled up with zeros, y would teach that nothing but the named tokens may come."""
    y = np.full(VOCAB, 0.4 / (VOCAB - 2))
    y[:2] = 0.35, 0.25
    logits = torch.tensor(np.log(y), requires_grad=True)
    divergence = sparse_kl(logits[None], torch.tensor([[0, 1]]), torch.tensor([[0.35, 0.25]], dtype=torch.float64))
    divergence.sum().backward()
    assert divergence.item() == pytest.approx(0.0, abs=1e-12)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_rows_that_name_fewer_tokens_are_filled_up() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    ids, p = torch.tensor([[4, -1, -1], [2, 7, 9]]), torch.tensor([[0.6, 0.0, 0.0], [0.5, 0.2, 0.1]])
    alone = sparse_kl(logits[:1], ids[:1, :1], p[:1, :1])
    assert torch.allclose(sparse_kl(logits, ids, p)[:1], alone)


@pytest.mark.parametrize("far", [20.0, 60.0, 1e4])
def test_a_tail_far_below_rounding_has_a_finite_exact_gradient(far: float) -> None:
    logits = torch.zeros(1, VOCAB, requires_grad=True)
    with torch.no_grad():
        logits[0, 0] = far
    sparse_kl(logits, torch.tensor([[0]]), torch.tensor([[0.5]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == pytest.approx(0.5, rel=1e-5)  # x_0 - y_0
    assert logits.grad[0, 1:].sum().item() == pytest.approx(-0.5, rel=1e-5)


def test_all_of_a_small_vocabulary_may_be_named() -> None:
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    sparse_kl(logits, torch.arange(4)[None], p).sum().backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, logits.detach().softmax(1) - p, atol=1e-6)


def test_the_likeliest_keep_their_probability_among_all() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    ids, p = likeliest(logits, 5)
    assert torch.allclose(p, logits.softmax(1).gather(1, ids))
    assert torch.allclose(sparse_kl(logits, ids, p), torch.zeros(3), atol=1e-6)
