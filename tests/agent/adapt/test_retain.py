"""Plain text among the lessons holds what an adapter was not asked to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from agent.adapt.lesson import check
from agent.adapt.plain_text import PASSAGES
from agent.adapt.retain import plain
from models.engine.base import Tokenizer


class Letters:
    """A tokenizer of bytes."""

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        return [0] * start + list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids[1:]).decode()


def test_every_step_is_to_stay_and_the_gate_reads_other_text() -> None:
    letters = Letters()
    lessons = plain(cast(Tokenizer, letters))
    assert len(lessons) >= 4
    for lesson in lessons:
        check(lesson)
        assert [target.position for target in lesson.targets] == list(range(1, len(lesson.tokens)))
        assert {target.kind for target in lesson.targets} == {"kept"}
        assert not any(letters.decode(lesson.tokens)[:40] in passage for passage in PASSAGES)
