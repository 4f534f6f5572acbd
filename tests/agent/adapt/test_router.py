"""Which adapter is near a prompt, and how much say it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.adapt.lesson import Lesson, Target
from agent.adapt.router import Router, centroid, embed, excerpt, prompt_of, route
from agent.memory.key import CALIBRATION, KeyMaker
from models.chat import encode_chat
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from protocol.resolve import Message

Floats = NDArray[np.float32]

TASKS = {
    "code": [
        f"Write a Python function to {what}."
        for what in ("reverse a string", "count the words in a file", "compute the median of a list")
    ],
    "extract": [
        f"Extract name and date as JSON from this text: {text}."
        for text in ("Anna bought a tent on 3 May 1999", "Ben sold a lamp on 9 May 2011", "Chen rented a van on 1 May")
    ],
    "translate": [
        f"Translate into German: {text}"
        for text in ("The ferry leaves at noon.", "My sister lives by the sea.", "It rained all week.")
    ],
}


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    engine = GgufEngine(smollm2, context=256, sequences=1, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def states(engine: Engine) -> Callable[[Sequence[int]], Floats]:
    """The bare model's hidden states at each token."""

    @cache
    def read(tokens: tuple[int, ...]) -> Floats:
        place = engine.open(tokens, 0)
        place.rewind(0)
        seen = []
        for token in tokens:
            (step,) = engine.forward([(place, [token])])
            assert step.hidden is not None
            seen.append(step.hidden.copy())
        place.close()
        return np.array(seen)

    return lambda tokens: read(tuple(tokens))


@pytest.fixture(scope="module")
def keys(engine: Engine, states: Callable[[Sequence[int]], Floats]) -> KeyMaker:
    return KeyMaker.of(b"", [states(engine.tokenizer.encode(text, start=True)) for text in CALIBRATION])


def prompt(engine: Engine, text: str) -> list[int]:
    return encode_chat(engine.tokenizer, [Message("user", text)])


def lesson(engine: Engine, text: str) -> Lesson:
    asked = prompt(engine, text)
    return Lesson([*asked, 5, 6, 7], [Target(len(asked) + 2, "label", [7])], "cloud", prompt=len(asked))


@pytest.fixture(scope="module")
def centroids(engine: Engine, states: Callable[[Sequence[int]], Floats]) -> list[tuple[str, Floats]]:
    """Of each task, by its first two prompts."""
    made = []
    for name, texts in TASKS.items():
        centre = centroid(states, engine.tokenizer, [lesson(engine, text) for text in texts[:2]])
        assert centre is not None
        made.append((name, centre))
    return made


@pytest.mark.parametrize("task", TASKS)
def test_a_request_gets_the_adapter_that_learned_its_task(
    engine: Engine, keys: KeyMaker, centroids: list[tuple[str, Floats]], task: str
) -> None:
    assert Router(keys).choose(engine, prompt(engine, TASKS[task][2]), centroids) == ((task, 1.0),)


@pytest.mark.parametrize("text", ["Hello, how are you?", "Tell me a joke.", "Who wrote Hamlet?"])
def test_what_no_adapter_has_learned_gets_none(
    engine: Engine, keys: KeyMaker, centroids: list[tuple[str, Floats]], text: str
) -> None:
    assert Router(keys).choose(engine, prompt(engine, text), centroids) == ()


def test_several_are_mixed_by_how_near_they_are(
    engine: Engine, keys: KeyMaker, centroids: list[tuple[str, Floats]]
) -> None:
    mix = dict(Router(keys, mix=2, near=-1.0).choose(engine, prompt(engine, TASKS["code"][2]), centroids))
    assert len(mix) == 2
    assert mix["code"] == max(mix.values()) > 0.5
    assert sum(mix.values()) == pytest.approx(1.0)


def test_a_prompt_and_a_centroid_are_read_alike(
    engine: Engine, keys: KeyMaker, states: Callable[[Sequence[int]], Floats]
) -> None:
    """The centroid of one prompt, computed elsewhere, is what the agent compares that prompt by."""
    text = " ".join(TASKS["translate"] * 5)  # longer than what is read of it
    centre = centroid(states, engine.tokenizer, [lesson(engine, text)])
    assert centre is not None
    assert float(np.linalg.norm(centre)) == pytest.approx(1.0, abs=1e-5)
    assert float(centre @ embed(engine, keys, prompt(engine, text))) > 0.99


def test_reading_takes_no_place_from_requests(engine: Engine, keys: KeyMaker) -> None:
    asked = prompt(engine, "Hello")
    place = engine.open(asked, 8)
    engine.forward([(place, place.align(asked))])
    assert engine.free == 0
    embed(engine, keys, list(range(40, 240)))
    assert place.tokens == asked
    place.close()


def test_an_adapter_of_another_width_is_left_out(engine: Engine, keys: KeyMaker) -> None:
    assert Router(keys, near=-1.0).choose(engine, [1, 2, 3], [("odd", np.ones(7, np.float32))]) == ()


def test_both_ends_of_a_long_prompt_count() -> None:
    assert excerpt(range(64)) == list(range(64))
    assert excerpt(range(1000)) == [*range(32), *range(968, 1000)]


def test_of_a_lesson_what_was_read_before_the_answer() -> None:
    targets = [Target(5, "label", [1])]
    assert prompt_of(Lesson(list(range(9)), targets, "cloud", prompt=3)) == [0, 1, 2]
    assert prompt_of(Lesson(list(range(9)), targets, "example")) == [0, 1, 2, 3, 4]


@given(
    angles=st.dictionaries(st.sampled_from("abcdef"), st.floats(0.0, 3.1), min_size=1),
    most=st.integers(1, 8),
    near=st.floats(-1.0, 1.0),
)
def test_a_mix_is_of_the_nearest_and_sums_to_one(angles: dict[str, float], most: int, near: float) -> None:
    around = {id: np.array([np.cos(angle), np.sin(angle)], np.float32) for id, angle in angles.items()}
    mix = route(np.array([1.0, 0.0], np.float32), list(around.items()), most, near)
    close = {id for id, direction in around.items() if direction[0] >= near + 1e-6}
    assert min(len(close), most) <= len(mix) <= most
    assert list(mix) == sorted(mix)
    if mix:
        assert sum(weight for _, weight in mix) == pytest.approx(1.0)
        left = [angles[id] for id in close - dict(mix).keys()]
        assert not left or max(angles[id] for id, _ in mix) <= min(left) + 1e-3
