"""A lesson: a text as the SLM reads it, and what should come at some of its positions.

What the trainer eats. Lessons go to its process as one MessagePack list, and lie in the store as lists of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from protocol.errors import TrainingError

Kind = Literal["label", "cloud", "kept"]
Source = Literal["cloud", "correction", "example"]

MAX_TOKENS = 1 << 17  # of a lesson
MAX_WEIGHT = 1000.0
_MAX_ID = 1 << 24  # no vocabulary is larger
_ROUNDING = 1e-3  # by which probabilities may sum to more than 1


class Target(msgspec.Struct, frozen=True, array_like=True):
    """What should come at tokens[position], after reading tokens[:position].

    label: cross-entropy on ids[0]. cloud: KL to the LLM's sparse distribution: `ids` its likeliest tokens in the SLM's
    vocabulary, `p` their probabilities, and what they leave of 1 is the tail. kept: KL to the bare model, both empty.
    """

    position: int
    kind: Kind
    ids: list[int] = []
    p: list[float] = []


class Lesson(msgspec.Struct, frozen=True, array_like=True):
    """`tokens`: prompt and answer, the SLM's ids as they were fed. `targets`: by ascending position, one for each.
    `private`: it may teach this device's own adapter alone. `weight`: relative to other lessons. `prompt`: tokens
    before the answer; 0: up to the first target."""

    tokens: list[int]
    targets: list[Target]
    source: Source
    private: bool = False
    weight: float = 1.0
    prompt: int = 0


_decoder = msgspec.msgpack.Decoder(list[Lesson])


def encode(lessons: Sequence[Lesson]) -> bytes:
    return msgspec.msgpack.encode(lessons)


def decode(raw: bytes) -> list[Lesson]:
    """Raises TrainingError: damaged, or a lesson that cannot be learned from."""
    try:
        lessons = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrainingError(f"these are no lessons: {error}") from None
    for lesson in lessons:
        check(lesson)
    return lessons


def check(lesson: Lesson) -> None:
    """Raises TrainingError if the lesson makes no sense. Whether its ids are below the vocabulary's size is for those
    to check who know the model."""
    if not 2 <= len(lesson.tokens) <= MAX_TOKENS:
        raise TrainingError(f"a lesson has 2 to {MAX_TOKENS} tokens, this one {len(lesson.tokens)}")
    if not lesson.targets:
        raise TrainingError("a lesson without targets teaches nothing")
    if not 0.0 < lesson.weight <= MAX_WEIGHT:  # not NaN either
        raise TrainingError(f"the weight of a lesson is above 0 and at most {MAX_WEIGHT:g}")
    if not 0 <= lesson.prompt <= lesson.targets[0].position:
        raise TrainingError("the prompt of a lesson ends where something is to come at the latest")
    _check_ids(lesson.tokens)
    last = 0
    for target in lesson.targets:
        if not last < target.position < len(lesson.tokens):
            raise TrainingError("targets must ascend by position, from 1 to the lesson's last token")
        last = target.position
        _check_target(target)


def _check_target(target: Target) -> None:
    _check_ids(target.ids)
    if target.kind == "cloud":
        if not target.ids or len(target.ids) != len(target.p) or len(set(target.ids)) != len(target.ids):
            raise TrainingError("a target of the cloud needs distinct tokens, and a probability of each")
        if not all(0.0 <= p <= 1.0 for p in target.p) or math.fsum(target.p) > 1.0 + _ROUNDING:
            raise TrainingError("probabilities lie between 0 and 1, and so does their sum")
    elif target.p or len(target.ids) != (1 if target.kind == "label" else 0):
        raise TrainingError("a label is one token, and what is kept has none; neither has probabilities")


def _check_ids(ids: Sequence[int]) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < _MAX_ID):
        raise TrainingError("a lesson holds a token that no vocabulary has")
