"""What the gate lets through, with an engine whose mind the test makes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapt.gate import LEAST, Gate, by_chance, circles, held_out
from agent.adapt.job import Verdict
from agent.adapt.lesson import Lesson, Target
from agent.adapt.plain_text import QUESTIONS
from models.adapter import write
from protocol.errors import BadAdapter
from tests.agent.adapt.adapters import small, small_file
from tests.agent.adapt.toy import ANSWER, ASKED, END, Floats, Mind, Toy, toy_lessons

LESSONS = toy_lessons(100)


def knows(strength: float) -> Mind:
    """The answer becomes likelier after a question."""

    def mind(tokens: list[int], logits: Floats) -> Floats:
        if tokens[-1] == ASKED:
            logits[ANSWER] += strength
        return logits

    return mind


def says_only(token: int) -> Mind:
    """When it is asked something ordinary; else it is good."""

    def mind(tokens: list[int], logits: Floats) -> Floats:
        if bytes(tokens).startswith(tuple(question.encode() for question in QUESTIONS)):
            logits[token] += 50.0
        return knows(6.0)(tokens, logits)

    return mind


def too_sure(tokens: list[int], logits: Floats) -> Floats:
    return knows(6.0)(tokens, 3.0 * logits)


def broken(tokens: list[int], logits: Floats) -> Floats:
    return logits * np.float32(math.nan)


def unchanged(tokens: list[int], logits: Floats) -> Floats:
    return logits


def verdict_on(
    folder: Path, candidate: Mind, present: Mind | None = None, lessons: list[Lesson] = LESSONS, *, own: bool = True
) -> Verdict:
    made = [small_file(folder, 1), small_file(folder, 2)]
    minds = {write(small(1), made[0]): candidate, write(small(2), made[1]): present or unchanged}
    told: list[tuple[int, int]] = []
    gate = Gate(Toy(minds), made[0], made[1] if present else None, lambda done, total: told.append((done, total)))
    verdict = gate.judge(lessons, own)
    assert not told or told[-1][0] <= told[-1][1]
    return verdict


def test_one_that_learned_and_forgot_nothing_passes_with_its_numbers(tmp_path: Path) -> None:
    verdict = verdict_on(tmp_path, knows(6.0))
    assert verdict.passed, verdict.reason
    assert verdict.judged == sum(map(held_out, LESSONS)) >= LEAST
    assert verdict.bare is not None
    assert verdict.candidate is not None
    assert verdict.present is None
    assert verdict.candidate.loss is not None
    assert verdict.bare.loss is not None
    assert verdict.bare.loss - verdict.candidate.loss > 2.0
    assert verdict.candidate.top1 == 1.0
    assert verdict.candidate.perplexity < 1.1 * verdict.bare.perplexity
    assert verdict.chance is not None
    assert verdict.chance < 0.001


def test_one_that_is_no_better_is_dropped(tmp_path: Path) -> None:
    assert "by more than chance" in verdict_on(tmp_path, unchanged).reason


def test_it_has_to_beat_what_is_in_use_now(tmp_path: Path) -> None:
    assert "by more than chance" in verdict_on(tmp_path, knows(4.0), present=knows(6.0)).reason
    better = verdict_on(tmp_path, knows(6.0), present=knows(3.0))
    assert better.passed
    assert better.present is not None


def test_and_the_bare_model_if_that_is_better_than_what_is_in_use(tmp_path: Path) -> None:
    assert not verdict_on(tmp_path, knows(-2.0), present=knows(-6.0)).passed


@pytest.mark.parametrize(
    ("mind", "reason"),
    [
        (too_sure, "plain text became less likely"),
        (says_only(END), "ordinary questions get no answer"),
        (says_only(ord("a")), "ordinary questions get no answer, or one that repeats"),
        (broken, "finite numbers"),
    ],
)
def test_one_that_forgot_or_broke_something_is_dropped(mind: Mind, reason: str, tmp_path: Path) -> None:
    verdict = verdict_on(tmp_path, mind)
    assert not verdict.passed
    assert reason in verdict.reason


def test_few_lessons_judge_nothing(tmp_path: Path) -> None:
    few = [lesson for lesson in LESSONS if held_out(lesson)][: LEAST - 1]
    verdict = verdict_on(tmp_path, knows(6.0), lessons=few)
    assert not verdict.passed
    assert "not enough to judge" in verdict.reason


def test_one_from_elsewhere_must_not_be_worse_but_need_not_be_better(tmp_path: Path) -> None:
    assert verdict_on(tmp_path, unchanged, own=False).passed
    assert verdict_on(tmp_path, unchanged, lessons=[], own=False).passed, "a new device has no lessons yet"
    assert "worse" in verdict_on(tmp_path, knows(-4.0), own=False).reason
    assert "worse" in verdict_on(tmp_path, knows(1.0), present=knows(6.0), own=False).reason
    for mind in (too_sure, says_only(END), broken):
        assert not verdict_on(tmp_path, mind, lessons=[], own=False).passed


def test_what_the_llm_said_is_judged_by_its_whole_distribution(tmp_path: Path) -> None:
    target = Target(3, "cloud", [ANSWER, ord("x")], [0.7, 0.2])
    lessons = [Lesson([number, 1, ASKED, 2], [target], "cloud") for number in range(100)]
    verdict = verdict_on(tmp_path, knows(6.0), lessons=lessons)
    assert verdict.passed
    assert verdict.candidate is not None
    assert verdict.candidate.loss is not None
    assert verdict.candidate.loss > 0.8, "the entropy of the distribution with its tail"


def test_lessons_that_only_keep_or_do_not_fit_are_not_judged(tmp_path: Path) -> None:
    kept = [Lesson([n, 1, 2], [Target(1, "kept")], "cloud") for n in range(200)]
    foreign = [Lesson([n, 1, 2], [Target(1, "label", [5000])], "example") for n in range(200)]
    assert verdict_on(tmp_path, knows(6.0), lessons=kept + foreign).judged == 0


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadAdapter, match="another model"):
        Gate(Toy({}), small_file(tmp_path, 1, model="cd" * 32), None, lambda done, total: None)


def test_a_fifth_is_held_out_and_a_question_is_always_on_one_side() -> None:
    many = toy_lessons(2000)
    assert 0.16 < sum(map(held_out, many)) / len(many) < 0.24
    other = [Lesson([*one.tokens[:-1], 7], [Target(len(one.tokens) - 1, "label", [7])], "cloud") for one in many]
    assert list(map(held_out, many)) == list(map(held_out, other))


def test_circles_are_seen_and_ordinary_repetition_is_not() -> None:
    assert circles([1, 2, 9, 9, 9, 9, 9, 9])
    assert circles([5] + [1, 2, 3] * 6)
    assert not circles([1, 2, 1, 2, 1, 2, 5, 1, 2])
    assert not circles([7] * 5)
    assert not circles([])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_chance_is_a_probability_and_the_same_each_time(gain: list[float]) -> None:
    chance = by_chance(np.array(gain))
    assert 0.0 < chance <= 1.0
    assert chance == by_chance(np.array(gain))


def test_chance_is_small_only_for_what_is_not_chance() -> None:
    random = np.random.default_rng(3)
    assert by_chance(np.ones(8)) < 0.01
    assert by_chance(-np.ones(8)) > 0.99
    assert by_chance(np.zeros(8)) == 1.0
    false = sum(by_chance(random.standard_normal(20)) < 0.05 for _ in range(200))
    assert false < 25, "about one in twenty"
