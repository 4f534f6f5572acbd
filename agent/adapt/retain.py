"""Plain text that an adapter is to leave as it is.

Labels and corrections say nothing of anything else, and a small model that learns seventy of them forgets the rest:
perplexity of plain text rose from 46 to 329 (SmolLM2, rank 8, six epochs), and to 49 with these lessons among them.
"""

from __future__ import annotations

from agent.adapt.lesson import Lesson, Target
from agent.memory.key import CALIBRATION
from models.engine.base import Tokenizer

_WEIGHT = 4.0  # of each, beside a lesson's 1


def plain(tokenizer: Tokenizer) -> list[Lesson]:
    """Lessons whose every step is to stay as the bare model has it; not the text that the gate reads."""
    texts = [tokenizer.encode(text, start=True) for text in CALIBRATION]
    return [Lesson(ids, [Target(at, "kept") for at in range(1, len(ids))], "example", weight=_WEIGHT) for ids in texts]
