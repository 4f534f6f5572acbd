"""The weight of the SLM where its distribution is fused with the LLM's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.combine import adaptive, combine, fuse
from agent.resolver import Reply
from models.sampling import softmax
from protocol.resolve import Sampling

VOCAB = 16
GREEDY = Sampling(temperature=0.0)


def sure(token: int, p: float) -> NDArray[np.float32]:
    """Logits of a distribution with p at `token` and the rest spread evenly."""
    x = np.full(VOCAB, (1.0 - p) / (VOCAB - 1), np.float32)
    x[token] = p
    return np.log(x)


def says(token: int, p: float) -> Reply:
    return Reply([token], [p], np.array([token]), np.array([p], np.float32), -1.0)


def drawn(x: NDArray[np.float32], reply: Reply, weight: float | str) -> int:
    draft = int(x.argmax())
    return combine("fuse", weight, draft, x, reply, GREEDY, [], 0)  # type: ignore[arg-type]


def test_who_is_surer_has_more_of_a_say() -> None:
    assert drawn(sure(3, 0.9), says(7, 0.5), "adaptive") == 3
    assert drawn(sure(3, 0.5), says(7, 0.9), "adaptive") == 7


def test_a_constant_weight_does_not_mind() -> None:
    assert drawn(sure(3, 0.6), says(7, 0.9), 0.75) == 3
    assert drawn(sure(3, 0.6), says(7, 0.9), "adaptive") == 7


def test_the_tail_of_what_was_told_lies_where_the_device_puts_it() -> None:
    x = softmax(sure(3, 0.9))
    fused = fuse(x, says(7, 0.4), "adaptive")
    assert float(fused.sum()) == pytest.approx(1.0, abs=1e-5)
    weight = 0.9 / (0.9 + 0.6 * 0.9 / (1 - float(x[7])))  # the LLM's likeliest is then in its tail
    assert float(fused[7]) == pytest.approx((1 - weight) * 0.4 + weight * float(x[7]), abs=1e-3)


@given(p=st.floats(0.1, 0.999), q=st.floats(0.1, 0.999))
def test_the_weight_is_fair(p: float, q: float) -> None:
    x, y = softmax(sure(0, p)), softmax(sure(1, q))
    weight = adaptive(x, y)
    assert 0.0 < weight < 1.0
    assert weight + adaptive(y, x) == pytest.approx(1.0)
    if p > q + 0.01:
        assert weight > 0.5
