from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.learn.sample import BINS, Histogram, Sample
from tests.agent.learn.worlds import LINEAR, TEXT, Device, World


@pytest.mark.parametrize("world", [TEXT, LINEAR])
def test_what_is_estimated_from_sent_steps_equals_what_all_steps_say(world: World) -> None:
    """Weighted by inverse propensity, in expectation."""
    whole, estimates = [], []
    for seed in range(60):
        device = Device(world, np.random.default_rng(seed), tau=0.6, audit=0.1)
        device.live(2000)
        weights = device.sample.weights()
        estimates.append((weights * device.sample.beta).sum() / device.sample.steps)
        _, beta, _ = world.steps(np.random.default_rng(seed), 2000)
        whole.append(beta.mean())
    error = np.std(np.subtract(estimates, whole)) / np.sqrt(60)
    assert abs(np.mean(estimates) - np.mean(whole)) < 4 * error
    assert np.mean(device.sample.beta) > 1.5 * np.mean(whole), "unweighted, the sent ones look far worse"


def test_weights_are_capped() -> None:
    sample = Sample.of([0.5] * 3, [0.0] * 3, [1.0, 0.1, 1e-6], [False] * 3, [0] * 3, [1e-6] * 3)
    assert sample.weights().tolist() == [1.0, 10.0, 20.0]
    assert sample.weights(5.0).tolist() == [1.0, 5.0, 5.0]


def test_samples_join_in_their_order_and_count_their_steps() -> None:
    one = Sample.of([0.1, 0.2], [0.0, 1.0], [1.0, 0.5], [False, True], [3, 0], [0.5, 0.5])
    both = Sample.join([one, Sample.empty(), one])
    assert both.u.tolist() == [0.1, 0.2, 0.1, 0.2]
    assert both.differs.dtype == np.bool_
    assert both.kept.dtype == np.int64
    assert both.steps == 10
    assert len(Sample.join([])) == 0


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        Sample.of([0.1], [0.2, 0.3], [1.0], [True], [0], [1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.floats(0, 1))
def test_the_share_above_a_quantile_is_the_rest(values: list[float], share: float) -> None:
    seen = Histogram(half_life=1e12)
    seen.add(values)
    assert abs(seen.total - len(values)) < 1e-6
    assert abs(seen.above(seen.quantile(share)) - (1 - share)) < 1e-6
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    assert seen.quantile(share) <= min(1.0, exact + 1 / BINS + 1e-9)


def test_a_histogram_forgets() -> None:
    seen = Histogram(half_life=100.0)
    for _ in range(20):
        seen.add([0.1] * 100)
    before = seen.above(0.5)
    for _ in range(5):
        seen.add([0.9] * 100)
    assert before == 0.0
    assert seen.above(0.5) > 0.9
    assert seen.total < 201
    assert seen.mean > 0.8


def test_an_empty_histogram_has_answers() -> None:
    seen = Histogram()
    assert (seen.total, seen.mean, seen.above(0.3), seen.quantile(0.5)) == (0.0, 0.0, 0.0, 0.0)
