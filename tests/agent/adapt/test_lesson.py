"""The form of lessons: what goes in comes out, and what makes no sense is refused."""

from __future__ import annotations

import contextlib
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapt.lesson import Lesson, Target, check, decode, encode
from protocol.errors import TrainingError

ids = st.integers(0, (1 << 24) - 1)


@st.composite
def targets(draw: st.DrawFn, position: int) -> Target:
    kind = draw(st.sampled_from(["label", "cloud", "kept"]))
    if kind == "label":
        return Target(position, "label", [draw(ids)])
    if kind == "kept":
        return Target(position, "kept")
    likeliest = draw(st.lists(ids, min_size=1, max_size=20, unique=True))
    shares = [draw(st.floats(0.0, 1.0)) for _ in likeliest]
    whole = max(1.0, math.fsum(shares))
    return Target(position, "cloud", likeliest, [share / whole for share in shares])


@st.composite
def lessons(draw: st.DrawFn) -> Lesson:
    tokens = draw(st.lists(ids, min_size=2, max_size=40))
    positions = draw(st.lists(st.integers(1, len(tokens) - 1), min_size=1, unique=True))
    taught = [draw(targets(position)) for position in sorted(positions)]
    weight = draw(st.floats(0.0, 1000.0, exclude_min=True))
    return Lesson(
        tokens, taught, draw(st.sampled_from(["cloud", "correction", "example"])), draw(st.booleans()), weight
    )


@given(st.lists(lessons(), max_size=4))
def test_what_is_encoded_is_decoded(given: list[Lesson]) -> None:
    assert decode(encode(given)) == given


@given(st.binary(max_size=300))
def test_other_bytes_are_refused_by_name(raw: bytes) -> None:
    with contextlib.suppress(TrainingError):
        found = decode(raw)
        assert decode(encode(found)) == found


@given(lessons(), st.data())
def test_what_is_torn_is_refused(lesson: Lesson, data: st.DataObject) -> None:
    raw = encode([lesson])
    with pytest.raises(TrainingError):
        decode(raw[: data.draw(st.integers(0, len(raw) - 1))])


LABEL = Target(1, "label", [3])


def of(target: Target = LABEL, **change: object) -> Lesson:
    return msgspec.structs.replace(Lesson([1, 2, 3], [target], "cloud"), **change)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (of(tokens=[1]), "tokens"),
        (of(tokens=[1] * 200_000), "tokens"),
        (of(tokens=[1, -1]), "no vocabulary"),
        (of(tokens=[1, 1 << 24]), "no vocabulary"),
        (of(targets=[]), "teaches nothing"),
        (of(weight=0.0), "weight"),
        (of(weight=math.nan), "weight"),
        (of(weight=math.inf), "weight"),
        (of(prompt=-1), "prompt"),
        (of(prompt=2), "prompt"),
        (of(Target(0, "kept")), "ascend"),
        (of(Target(3, "kept")), "ascend"),
        (of(targets=[LABEL, LABEL]), "ascend"),
        (of(Target(1, "label", [])), "a label is one token"),
        (of(Target(1, "label", [1, 2])), "a label is one token"),
        (of(Target(1, "label", [-1])), "no vocabulary"),
        (of(Target(1, "kept", [1])), "a label is one token"),
        (of(Target(1, "cloud")), "distinct tokens"),
        (of(Target(1, "cloud", [1, 1], [0.1, 0.1])), "distinct tokens"),
        (of(Target(1, "cloud", [1], [0.1, 0.1])), "distinct tokens"),
        (of(Target(1, "cloud", [1], [math.nan])), "probabilities"),
        (of(Target(1, "cloud", [1], [-0.1])), "probabilities"),
        (of(Target(1, "cloud", [1, 2], [0.9, 0.2])), "probabilities"),
    ],
)
def test_what_makes_no_sense_is_refused(bad: Lesson, why: str) -> None:
    with pytest.raises(TrainingError, match=why):
        check(bad)
    with pytest.raises(TrainingError, match=why):
        decode(encode([of(), bad]))


def test_a_target_of_another_kind_is_refused() -> None:
    with pytest.raises(TrainingError, match="no lessons"):
        decode(msgspec.msgpack.encode([[[1, 2, 3], [[1, "guess", [1], []]], "cloud", False, 1.0]]))
