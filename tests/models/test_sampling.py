"""Sampling against a straightforward reference in float64, one parameter at a time and all together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import stats

from models.sampling import Shaped, log_softmax, shape, shifted, softmax, top_ids, uniform
from protocol.resolve import Sampling

Logits = NDArray[np.float32]
RANDOM = np.random.default_rng(11)
WARM = Sampling(temperature=1.0, top_k=0)

values_with_ties = arrays.arrays(
    np.float32,
    st.integers(1, 400),
    elements=st.one_of(st.integers(-5, 5).map(float), st.floats(-30, 30, width=32), st.just(-np.inf)),
)


def dense(shaped: Shaped, vocab: int) -> NDArray[np.float64]:
    p = np.zeros(vocab)
    if shaped.ids is None:
        return shaped.p.astype(np.float64)
    p[shaped.ids] = shaped.p
    return p


def reference(logits: Logits, sampling: Sampling, recent: Sequence[int] = ()) -> NDArray[np.float64]:
    """llama.cpp's order: repetition penalty, top_k, top_p, min_p, temperature. Dense, (V,)."""
    wide = logits.astype(np.float64)
    for token in set(recent[-64:]):
        wide[token] = (
            wide[token] / sampling.repetition_penalty
            if wide[token] > 0
            else (wide[token] * sampling.repetition_penalty)
        )
    order = sorted(range(len(wide)), key=lambda token: (-wide[token], token))
    if sampling.temperature == 0.0:
        order = order[:1]
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    p = np.exp(wide[order] - wide[order[0]])
    p /= p.sum()
    if sampling.top_p < 1.0:
        reached = np.cumsum(p)
        order = [token for at, token in enumerate(order) if at == 0 or reached[at - 1] < sampling.top_p]
    if sampling.min_p > 0.0:
        order = [token for at, token in enumerate(order) if p[at] >= sampling.min_p * p[0]]
    e = np.exp((wide[order] - wide[order[0]]) / (sampling.temperature or 1.0))
    out = np.zeros(len(wide))
    out[order] = e / e.sum()
    return out


def logits_of(vocab: int = 1000, spread: float = 3.0) -> Logits:
    return (RANDOM.standard_normal(vocab) * spread).astype(np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, top_k=0),
        Sampling(temperature=0.3, top_k=0),
        Sampling(temperature=5.0, top_k=0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=0.7, top_k=40),
        Sampling(temperature=1.0, top_k=5000),
        Sampling(temperature=1.0, top_k=0, top_p=0.9),
        Sampling(temperature=1.5, top_k=0, top_p=0.37),
        Sampling(temperature=1.0, top_k=0, top_p=0.0),
        Sampling(temperature=1.0, top_k=0, min_p=0.05),
        Sampling(temperature=2.0, top_k=0, min_p=1.0),
        Sampling(temperature=0.8, top_k=50, top_p=0.85, min_p=0.02),
    ],
)
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_equals_the_reference(sampling: Sampling, penalty: float) -> None:
    sampling = Sampling(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, repetition_penalty=penalty
    )
    for _ in range(5):
        logits = logits_of()
        recent = [int(token) for token in top_ids(logits, 5)] + [7, 7, 500]
        np.testing.assert_allclose(
            dense(shape(logits, sampling, recent), len(logits)), reference(logits, sampling, recent), atol=2e-6
        )


class TestShape:
    def test_greedy_is_the_likeliest_whatever_the_rest(self) -> None:
        logits = np.array([1.0, 5.0, 5.0, -np.inf], np.float32)
        for sampling in (Sampling(), Sampling(top_k=0), Sampling(top_k=1, top_p=0.1, min_p=0.5)):
            shaped = shape(logits, sampling)
            assert [shaped.draw(r) for r in (0.0, 0.5, 0.999999)] == [1, 1, 1]
            assert shaped.at(1) == 1.0
            assert shaped.at(2) == 0.0

    def test_a_known_likeliest_changes_nothing(self) -> None:
        logits = logits_of()
        likeliest = int(logits.argmax())
        for sampling in (Sampling(), Sampling(repetition_penalty=3.0), Sampling(temperature=0.5)):
            plain, hinted = (shape(logits, sampling, [likeliest], hint) for hint in (-1, likeliest))
            np.testing.assert_array_equal(dense(plain, len(logits)), dense(hinted, len(logits)))

    def test_almost_no_temperature_is_greedy(self) -> None:
        logits = np.array([20.0, 10.0, -3.0, 19.9], np.float32)
        for temperature in (1e-3, 1e-6, 1e-20):
            for top_k in (0, 40):
                shaped = shape(logits, Sampling(temperature=temperature, top_k=top_k))
                assert shaped.at(0) == pytest.approx(1.0)

    def test_top_p_is_measured_before_the_temperature(self) -> None:
        logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
        for temperature in (0.1, 10.0):
            shaped = shape(logits, Sampling(temperature=temperature, top_k=0, top_p=0.85))
            assert shaped.at(1) > 0.0
            assert shaped.at(2) == 0.0

    def test_top_p_is_a_share_of_what_top_k_leaves(self) -> None:
        logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
        shaped = shape(logits, Sampling(temperature=1.0, top_k=2, top_p=0.55))
        assert dense(shaped, 4) == pytest.approx([1.0, 0.0, 0.0, 0.0])

    def test_penalty_comes_before_the_cut(self) -> None:
        logits = np.array([4.0, 3.0, -1.0], np.float32)
        shaped = shape(logits, Sampling(temperature=1.0, top_k=1, repetition_penalty=2.0), [0])
        assert shaped.at(1) == 1.0

    def test_penalty_looks_back_on_64_tokens(self) -> None:
        logits = np.array([4.0, 3.0, 0.0], np.float32)
        sampling = Sampling(repetition_penalty=2.0)
        assert shape(logits, sampling, [0] + [2] * 63).draw(0.0) == 1
        assert shape(logits, sampling, [0] + [2] * 64).draw(0.0) == 0

    def test_logits_are_left_as_they_were(self) -> None:
        logits = logits_of()
        before = logits.copy()
        for sampling in (Sampling(), Sampling(1.0, 0), Sampling(0.5, 40, 0.9, 0.1, 1.5)):
            shape(logits, sampling, [1, 2, 3])
        np.testing.assert_array_equal(logits, before)

    @given(
        logits=arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
        temperature=st.floats(0.05, 5.0),
        top_k=st.integers(0, 300),
        top_p=st.floats(0.0, 1.0),
        min_p=st.floats(0.0, 1.0),
        r=st.floats(0.0, 1.0, exclude_max=True),
    )
    def test_is_a_distribution_largest_first(
        self, logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float, r: float
    ) -> None:
        shaped = shape(logits, Sampling(temperature, top_k, top_p, min_p))
        assert float(shaped.p.sum()) == pytest.approx(1.0, abs=1e-5)
        assert (shaped.p >= 0.0).all()
        if shaped.ids is not None:
            assert len(set(shaped.ids.tolist())) == len(shaped.ids) == len(shaped.p)
            assert all(a >= b for a, b in pairwise(shaped.p.tolist()))
        assert shaped.at(shaped.draw(r)) > 0.0
        assert shaped.at(int(logits.argmax())) == pytest.approx(float(shaped.p.max()))

    def test_masked_tokens_are_never_drawn(self) -> None:
        logits = np.full(100, -np.inf, np.float32)
        logits[[3, 50]] = 0.0
        for sampling in (WARM, Sampling(2.0, 40), Sampling(1.0, 0, 0.99)):
            drawn = {shape(logits, sampling).draw(uniform(0, at)) for at in range(200)}
            assert drawn == {3, 50}

    @pytest.mark.parametrize("bad", [[np.nan, 1.0], [-np.inf, -np.inf]])
    def test_unusable_logits_are_an_error(self, bad: list[float]) -> None:
        with pytest.raises(ValueError, match="NaN or all -inf"):
            shape(np.array(bad, np.float32), WARM)


class TestDraw:
    def test_quantiles(self) -> None:
        shaped = Shaped(np.array([7, 3, 9]), np.array([0.5, 0.25, 0.25], np.float32))
        drawn = [shaped.draw(r) for r in (0.0, 0.499, 0.5, 0.749, 0.75, 1.0 - 2**-53)]
        assert drawn == [7, 7, 3, 3, 9, 9]

    def test_what_has_no_probability_is_never_drawn(self) -> None:
        shaped = Shaped(None, np.array([0.0, 0.5, 0.0, 0.5, 0.0], np.float32))
        assert [shaped.draw(r) for r in (0.0, 0.5, 1.0 - 2**-53)] == [1, 3, 3]

    def test_needs_not_be_normalised(self) -> None:
        assert Shaped(None, np.array([2.0, 6.0], np.float32)).draw(0.26) == 1

    @pytest.mark.parametrize("sampling", [WARM, Sampling(0.7, 20), Sampling(1.3, 0, 0.8)])
    def test_draws_follow_the_distribution(self, sampling: Sampling) -> None:
        logits = logits_of(30, 1.5)
        p = reference(logits, sampling)
        shaped, count = shape(logits, sampling), 20_000
        seen = np.bincount([shaped.draw(uniform(5, at)) for at in range(count)], minlength=30)
        assert seen[p == 0.0].sum() == 0
        assert stats.chisquare(seen[p > 0.0], p[p > 0.0] / p.sum() * count).pvalue > 1e-4

    def test_the_same_seed_draws_the_same(self) -> None:
        shaped = shape(logits_of(), WARM)

        def text(seed: int) -> list[int]:
            return [shaped.draw(uniform(seed, at)) for at in range(50)]

        assert text(1) == text(1)
        assert text(1) != text(2)


class TestTopIds:
    @given(values=values_with_ties, k=st.integers(1, 410))
    def test_is_exact_with_the_lower_index_first(self, values: Logits, k: int) -> None:
        wanted = sorted(range(len(values)), key=lambda index: (-float(values[index]), index))[:k]
        assert top_ids(values, k).tolist() == wanted

    @pytest.mark.parametrize("spread", [0.001, 1.0, 3.0, 20.0, 1e30])
    @pytest.mark.parametrize("k", [1, 8, 40, 5000])
    def test_at_a_real_vocabulary(self, spread: float, k: int) -> None:
        values = (RANDOM.standard_normal(49_152) * spread).astype(np.float32)
        assert top_ids(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()

    def test_of_equal_values(self) -> None:
        assert top_ids(np.zeros(49_152, np.float32), 5).tolist() == [0, 1, 2, 3, 4]

    def test_with_infinities(self) -> None:
        values = np.array([0.0, np.inf, -np.inf, np.inf, 1.0], np.float32)
        assert top_ids(values, 4).tolist() == [1, 3, 4, 0]


class TestSoftmax:
    @given(arrays.arrays(np.float32, st.integers(1, 300), elements=st.floats(-39, 39, width=32)))
    def test_agrees_with_float64(self, logits: Logits) -> None:
        wide = np.exp(logits.astype(np.float64) - logits.max())
        wide /= wide.sum()
        np.testing.assert_allclose(softmax(logits), wide, atol=1e-6)
        np.testing.assert_allclose(log_softmax(logits), np.log(wide), atol=2e-5, rtol=1e-5)

    def test_of_infinities(self) -> None:
        logits = np.array([np.inf, 0.0, -np.inf, np.inf], np.float32)
        assert softmax(logits).tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5])
        assert np.isfinite(log_softmax(logits)).all()
        assert np.isfinite(log_softmax(np.array([0.0, -np.inf], np.float32))).all()

    @pytest.mark.parametrize("bad", [[np.nan, 1.0], [-np.inf, -np.inf], [np.inf, np.nan]])
    def test_unusable_logits_are_an_error(self, bad: list[float]) -> None:
        with pytest.raises(ValueError, match="NaN or all -inf"):
            shifted(np.array(bad, np.float32))


class TestUniform:
    def test_depends_on_its_arguments_alone(self) -> None:
        assert uniform(1, 2, 3) == uniform(1, 2, 3)
        assert uniform(-1, 2) == uniform((1 << 64) - 1, 2)

    @given(st.integers(-(1 << 70), 1 << 70), st.integers(0, 1 << 40), st.integers(0, 100))
    def test_lies_in_0_to_1(self, seed: int, position: int, purpose: int) -> None:
        assert 0.0 <= uniform(seed, position, purpose) < 1.0

    @pytest.mark.parametrize("along", ["seed", "position", "purpose"])
    def test_is_uniform_along_each_argument(self, along: str) -> None:
        drawn = [uniform(**{"seed": 3, "position": 4, "purpose": 5, along: at}) for at in range(20_000)]
        counts = np.histogram(drawn, bins=100, range=(0.0, 1.0))[0]
        assert stats.chisquare(counts).pvalue > 1e-4

    @pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 8), (1, -1, 0), (0, 1, -1), (-1, 0, 1)])
    def test_neighbours_are_independent(self, step: tuple[int, int, int]) -> None:
        one = [uniform(100 + at, 200 + at % 97, at % 5) for at in range(20_000)]
        other = [uniform(100 + at + step[0], 200 + at % 97 + step[1], at % 5 + step[2]) for at in range(20_000)]
        table = np.histogram2d(one, other, bins=10, range=((0, 1), (0, 1)))[0]
        assert stats.chi2_contingency(table).pvalue > 1e-4

    def test_no_two_decisions_share_a_number(self) -> None:
        drawn = {uniform(s, at, why) for s in range(20) for at in range(200) for why in range(16)}
        assert len(drawn) == 20 * 200 * 16
