"""Keys and tails: what they keep of a step, and that peers make them alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.memory.key import KEY_BYTES, TAILS, KeyMaker, shared_tail, space_of, tail
from models.engine.base import Engine
from models.engine.open import EngineOptions, open_engine

Floats = NDArray[np.float32]


@pytest.fixture(scope="module", params=["smollm2", "smollm2_int4"])
def slm(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def engine(slm: Path) -> Iterator[Engine]:
    engine = open_engine(slm, EngineOptions(context=1024, sequences=2))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def maker(engine: Engine) -> KeyMaker:
    return KeyMaker.calibrate(engine)


def hidden(engine: Engine, text: str) -> Floats:
    ids = engine.tokenizer.encode(text, start=True)
    place = engine.open(ids, 0)
    (step,) = engine.forward([(place, place.align(ids))])
    assert step.hidden is not None
    state = step.hidden.copy()
    place.close()
    return state


def cosine(a: NDArray[np.int8], b: NDArray[np.int8]) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(x @ y / np.sqrt(x @ x * (y @ y)))


def test_a_key_is_small_and_uses_the_whole_range_of_a_byte(engine: Engine, maker: KeyMaker) -> None:
    key = maker.key(hidden(engine, "The capital of France is"))
    assert (key.dtype, key.shape) == (np.int8, (KEY_BYTES,))
    assert int(np.abs(key.astype(int)).max()) == 127


def test_the_same_question_in_other_words_is_nearer_than_another_question(engine: Engine, maker: KeyMaker) -> None:
    here = maker.key(hidden(engine, "The capital of France is"))
    reworded = maker.key(hidden(engine, "Everybody knows that the capital city of France is"))
    other = maker.key(hidden(engine, "My favourite way to cook potatoes is to"))
    assert cosine(here, reworded) > cosine(here, other) + 0.2


def test_standardising_spreads_out_what_lies_in_a_narrow_cone(engine: Engine, maker: KeyMaker) -> None:
    texts = ("He scored in the last minute and", "Shares fell after", "Stir the soup and", "import numpy as")
    states = [hidden(engine, text) for text in texts]
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    raw = [float(states[i] @ states[j] / np.linalg.norm(states[i]) / np.linalg.norm(states[j])) for i, j in pairs]
    keys = [maker.key(state) for state in states]
    assert np.mean([cosine(keys[i], keys[j]) for i, j in pairs]) < np.mean(raw) - 0.2


def test_two_devices_make_the_same_key(engine: Engine, maker: KeyMaker, slm: Path) -> None:
    other = open_engine(slm, EngineOptions(context=512, sequences=1, threads=1))
    try:
        theirs = KeyMaker.calibrate(other)
        assert theirs.space == maker.space == space_of(other.info.fingerprint)
        text = "The weather in Bergen is"
        assert cosine(theirs.key(hidden(other, text)), maker.key(hidden(engine, text))) > 0.999
    finally:
        other.close()


def test_calibrating_leaves_the_engine_to_others(engine: Engine) -> None:
    free = engine.free
    KeyMaker.calibrate(engine)
    assert engine.free == free


def test_spaces_differ_by_model_and_adapter() -> None:
    assert len({space_of("a" * 64), space_of("b" * 64), space_of("a" * 64, "c" * 64)}) == 3
    assert len(space_of("a" * 64)) == 16


def test_what_was_saved_comes_back(maker: KeyMaker, tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    maker.save(path)
    loaded = KeyMaker.load(path, maker.space, 576)
    assert loaded is not None
    state = np.random.default_rng(1).standard_normal(576).astype(np.float32)
    assert np.array_equal(loaded.key(state), maker.key(state))
    assert [found.name for found in path.parent.iterdir()] == ["key"]


def test_what_is_missing_damaged_or_of_another_space_is_made_anew(maker: KeyMaker, tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert KeyMaker.load(path, maker.space, 576) is None
    maker.save(path)
    assert KeyMaker.load(path, space_of("0" * 64), 576) is None
    assert KeyMaker.load(path, maker.space, 577) is None
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:40] + b"\xff" + whole[41:], b"", b"x"):
        path.write_bytes(broken)
        assert KeyMaker.load(path, maker.space, 576) is None


@given(st.integers(0, 2**32 - 1))
def test_cosines_survive_projection_and_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(576).astype(np.float32)
    b = (0.9 * a + 0.4359 * rng.standard_normal(576)).astype(np.float32)  # a cosine of about 0.9
    maker = KeyMaker(b"", np.zeros(576, np.float32), np.ones(576, np.float32))
    exact = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert cosine(maker.key(a), maker.key(b)) == pytest.approx(exact, abs=0.12)  # six deviations


def test_a_state_that_says_nothing_has_a_key_of_zeros() -> None:
    maker = KeyMaker(b"", np.full(8, 3.0, np.float32), np.ones(8, np.float32))
    assert not maker.key(np.full(8, 3.0, np.float32)).any()
    assert not maker.key(np.full(8, np.nan, np.float32)).any()
    assert not maker.key(np.full(8, np.inf, np.float32)).any()


@given(st.lists(st.integers(0, 200_000), min_size=8, max_size=12), st.lists(st.integers(0, 200_000), min_size=8))
def test_a_shared_tail_is_counted_in_tokens(ending: list[int], before: list[int]) -> None:
    assert len(tail(ending)) == 8
    assert shared_tail(tail(ending), tail([*before, *ending])) == 8
    for n in TAILS:
        other = [*before, ending[-n] + 1, *ending[len(ending) - n + 1 :]]  # differs at the n-th token from the end
        shorter = max((m for m in TAILS if m < n), default=0)
        assert shared_tail(tail(ending), tail(other)) == shorter


def test_a_short_text_has_a_tail_too() -> None:
    assert tail([]) != tail([7]) != tail([7, 7])
    assert shared_tail(tail([7]), tail([7])) == 8
