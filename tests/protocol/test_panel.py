"""Whom a question goes to."""

from __future__ import annotations

from collections import Counter

from protocol.panel import Panel

NAMES = [f"device-{number:03}" for number in range(100)]


def test_few_are_all_asked() -> None:
    assert sorted(Panel().choose(NAMES[:4], 4)) == NAMES[:4]
    assert Panel().choose([], 4) == []


def test_of_many_only_a_few_are_asked_and_everybody_has_a_turn() -> None:
    panel = Panel()
    asked: Counter[str] = Counter()
    for _ in range(500):
        chosen = panel.choose(NAMES, 4)
        assert len(set(chosen)) == 4
        asked.update(chosen)
        for name in chosen:
            panel.answered(name, helped=False)
    assert set(asked) == set(NAMES)


def test_whoever_helped_is_asked_again() -> None:
    panel = Panel()
    panel.answered("device-042", helped=True)
    assert all("device-042" in panel.choose(NAMES, 4) for _ in range(50))


def test_whoever_never_answers_is_left_alone_until_it_does() -> None:
    panel = Panel()
    for _ in range(3):
        panel.silent("device-000")
    asked = sum("device-000" in panel.choose(NAMES[:3], 4) for _ in range(160))
    assert asked == 10
    panel.answered("device-000", helped=False)
    assert "device-000" in panel.choose(NAMES[:3], 4)


def test_when_nobody_answers_one_is_still_tried() -> None:
    panel = Panel()
    for name in NAMES[:3] * 3:
        panel.silent(name)
    assert all(len(panel.choose(NAMES[:3], 4)) == 1 for _ in range(40))
