"""Lessons for tests; run as a process, it adds them to a store until it is killed.

Arguments: the folder, and the number to begin with. Prints each number once its lesson is in the store.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from agent.adapt.lesson import Lesson, Source, Target
from agent.adapt.lessons import Lessons

MODEL = "a" * 64


def lesson(number: int = 0, source: Source = "example", *, private: bool = False, length: int = 4) -> Lesson:
    """`number` is found again as its first token."""
    return Lesson([number, *range(2, length + 1)], [Target(1, "label", [2])], source, private)


def numbers(lessons: Lessons, *, private: bool = True) -> list[int]:
    """Of what can be taken, oldest first."""
    return [one.tokens[0] for one in reversed(lessons.take(private))]


def main() -> None:
    lessons = Lessons(Path(sys.argv[1]), MODEL)
    for number in count(int(sys.argv[2])):
        lessons.add(lesson(number))
        if not lessons.waiting:
            print(number, flush=True)


if __name__ == "__main__":
    main()
