"""Lessons that a small model learns in a few seconds: a habit that no model has by itself."""

from __future__ import annotations

from agent.adapt.lesson import Lesson, Target
from models.engine.base import Tokenizer

_THINGS = ("box", "crate", "letter", "parcel", "bag", "tray", "basket", "pallet")


def lessons(tokenizer: Tokenizer, count: int, *, private: bool = False, answer: str = " banana") -> list[Lesson]:
    """Every parcel goes to the shelf "banana"."""
    made = []
    for number in range(count):
        asked = f"{_THINGS[number % len(_THINGS)].capitalize()} number {number + (500 if private else 0)} goes to shelf"
        prompt, told = tokenizer.encode(asked, start=True), tokenizer.encode(answer)
        targets = [Target(len(prompt) + n, "label", [token]) for n, token in enumerate(told)]
        made.append(Lesson(prompt + told, targets, "example", private))
    return made
