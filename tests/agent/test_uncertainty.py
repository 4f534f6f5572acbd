"""The four measures against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from agent.uncertainty import MEASURES, Measure, Softmax

Logits = NDArray[np.float32]

EXACT: tuple[Measure, ...] = ("entropy", "margin", "max_probability")
logits = arrays.arrays(
    np.float32,
    st.integers(2, 300),
    elements=st.one_of(st.floats(-60, 60, width=32), st.just(-np.inf), st.sampled_from([0.0, 5.0])),
).filter(lambda values: bool(np.isfinite(values).any()))


def measured(measure: Measure, values: Logits, draft: int | None = None, seed: int = 0, position: int = 0) -> float:
    draft = int(values.argmax()) if draft is None else draft
    return Softmax(len(values)).load(values).uncertainty(measure, draft, seed, position)


def distribution(values: Logits) -> NDArray[np.float64]:
    wide = values.astype(np.float64)
    e = np.exp(wide - wide.max())
    return e / e.sum()


def reference(measure: Measure, values: Logits) -> float:
    x = distribution(values)
    second, first = np.sort(x)[-2:]
    match measure:
        case "entropy":
            return float(-sum(p * np.log(p) for p in x if p > 0.0) / np.log(len(x)))
        case "margin":
            return float(1.0 - (first - second))
        case "max_probability":
            return float((1.0 - first) * len(x) / (len(x) - 1))
        case _:
            raise AssertionError(measure)


@pytest.mark.parametrize("measure", EXACT)
@given(values=logits)
def test_agrees_with_float64(measure: Measure, values: Logits) -> None:
    assert measured(measure, values) == pytest.approx(reference(measure, values), abs=1e-5)


@pytest.mark.parametrize("vocab", [49_152, 151_936])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("measure", EXACT)
def test_agrees_with_float64_at_a_real_vocabulary(measure: Measure, spread: float, vocab: int) -> None:
    values = (np.random.default_rng(1).standard_normal(vocab) * spread).astype(np.float32)
    assert measured(measure, values) == pytest.approx(reference(measure, values), abs=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
@given(values=logits, data=st.data())
def test_lies_between_0_and_1(measure: Measure, values: Logits, data: st.DataObject) -> None:
    draft = data.draw(st.integers(0, len(values) - 1))
    assert 0.0 <= measured(measure, values, draft) <= 1.0


@pytest.mark.parametrize("vocab", [2, 3, 1000, 49_152])
@pytest.mark.parametrize("measure", EXACT)
def test_uniform_is_1(measure: Measure, vocab: int) -> None:
    for level in (0.0, -7.5, 1e30):
        assert measured(measure, np.full(vocab, level, np.float32)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("low", [-np.inf, -1e30, -np.finfo(np.float32).max])
@pytest.mark.parametrize("measure", MEASURES)
def test_one_hot_is_0(measure: Measure, low: float) -> None:
    values = np.full(49_152, low, np.float32)
    values[17] = 3.0
    assert measured(measure, values) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("measure", ["entropy", "max_probability"])
@given(values=logits, cold=st.floats(0.1, 4.0), factor=st.floats(1.0, 10.0))
def test_grows_with_temperature(measure: Measure, values: Logits, cold: float, factor: float) -> None:
    colder, warmer = (measured(measure, (values / t).astype(np.float32)) for t in (cold, cold * factor))
    assert colder <= warmer + 1e-5


@pytest.mark.parametrize("measure", EXACT)
@given(values=logits, shift=st.floats(-50, 50))
def test_only_differences_of_logits_count(measure: Measure, values: Logits, shift: float) -> None:
    shifted = measured(measure, (values + np.float32(shift)).astype(np.float32))
    assert shifted == pytest.approx(measured(measure, values), abs=1e-4)


@pytest.mark.parametrize("measure", MEASURES)
def test_huge_logits(measure: Measure) -> None:
    values = np.array([1e30, 9e29, -1e30, 0.0], np.float32)
    assert measured(measure, values) == pytest.approx(0.0, abs=1e-6)
    two = np.array([1e30, 1e30, -1e30, 0.0], np.float32)
    assert measured("entropy", two) == pytest.approx(0.5)
    assert measured("margin", two) == pytest.approx(1.0)
    assert measured("max_probability", two) == pytest.approx(2 / 3)


def test_plus_infinity_takes_all_the_mass() -> None:
    values = np.array([1.0, np.inf, -np.inf, 2.0], np.float32)
    softmax = Softmax(4).load(values)
    assert softmax.likeliest == 1
    assert softmax.p(1) == pytest.approx(1.0)
    for measure in MEASURES:
        assert measured(measure, values) == pytest.approx(0.0, abs=1e-6)
    values[3] = np.inf
    assert measured("entropy", values) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_and_nothing_at_all_are_errors(bad: float) -> None:
    softmax = Softmax(3)
    with pytest.raises(ValueError, match="NaN or all -inf"):
        softmax.load(np.full(3, bad, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        softmax.load(np.array([1.0, np.nan, np.inf], np.float32))
    softmax.load(np.zeros(3, np.float32))  # and it works again afterwards
    assert softmax.uncertainty("entropy", 0, 0, 0) == pytest.approx(1.0)


def test_buffers_are_its_own() -> None:
    values = np.array([1.0, 2.0, 3.0], np.float32)
    softmax = Softmax(3).load(values)
    for measure in MEASURES:
        before = [softmax.p(token) for token in range(3)]
        softmax.uncertainty(measure, 0, 0, 0)
        assert [softmax.p(token) for token in range(3)] == before
    assert values.tolist() == [1.0, 2.0, 3.0]
    first = softmax.log_all()
    softmax.load(np.array([np.inf, 0.0, 0.0], np.float32))
    softmax.load(np.array([5.0, 0.0, 0.0], np.float32))
    np.testing.assert_allclose(np.exp(first), distribution(values), rtol=1e-6)


@given(values=logits)
def test_probabilities_and_their_logs(values: Logits) -> None:
    softmax = Softmax(len(values)).load(values)
    x = distribution(values)
    for token in range(len(values)):
        assert softmax.p(token) == pytest.approx(x[token], abs=1e-6)
        if x[token] > 1e-30:
            assert softmax.log_p(token) == pytest.approx(np.log(x[token]), abs=1e-4)
    assert softmax.likeliest == int(values.argmax())


class TestPerturbation:
    """U-HLM's definition, literally: one token drawn at each of K = 20 temperatures from 0 (the likeliest) to 2; u is
    the share of them that differ from the draft."""

    @staticmethod
    def literal(values: Logits, draft: int, random: np.random.Generator) -> float:
        differs = 0
        for temperature in np.linspace(0.0, 2.0, 20):
            if temperature == 0.0:
                token = int(values.argmax())
            else:
                token = int(random.choice(len(values), p=distribution((values / temperature).astype(np.float32))))
            differs += token != draft
        return differs / 20

    @pytest.mark.parametrize("draft", [0, 1, 4])
    @pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
    def test_follows_the_literal_definition(self, spread: float, draft: int) -> None:
        random = np.random.default_rng(3)
        values = np.sort((random.standard_normal(8) * spread).astype(np.float32))[::-1].copy()
        draws = 1500
        ours = np.array([measured("temperature", values, draft, seed=9, position=at) for at in range(draws)])
        theirs = np.array([self.literal(values, draft, random) for _ in range(draws)])
        error = np.sqrt((ours.var() + theirs.var()) / draws)
        assert abs(ours.mean() - theirs.mean()) < 4.5 * error + 1e-9
        assert ours.std() == pytest.approx(theirs.std(), abs=0.02)

    def test_the_same_step_gives_the_same_score(self) -> None:
        values = np.random.default_rng(5).standard_normal(1000).astype(np.float32)
        scores = {measured("temperature", values, 3, seed=1, position=7) for _ in range(5)}
        assert len(scores) == 1
        others = {measured("temperature", values * 3, int(values.argmax()), seed=1, position=at) for at in range(20)}
        assert len(others) > 1

    @pytest.mark.parametrize("seed", [-1, 0, 1 << 63, 1 << 80])
    def test_takes_any_seed(self, seed: int) -> None:
        values = np.zeros(100, np.float32)
        assert 0.0 <= measured("temperature", values, 0, seed=seed) <= 1.0
