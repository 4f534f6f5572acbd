"""Recorded answers in the order in which a row of devices writes them, as one table of steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.memory.base import Key
from agent.memory.key import tail
from tools.eval.steps import Steps
from tools.eval.tasks import Prompt

DEVICES = 4
NEW, REWORDED, REPEATED = "new", "reworded", "repeated"
_REPEATED_SHARE = 0.25

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    """One answer and its steps, as one row range of the recordings."""

    prompt: Prompt
    rows: range


@dataclass(frozen=True, slots=True)
class Recorded:
    """All steps of one pair of models, text after text: n rows. `keys` (n, 128) as memory sees them, `similarity`
    (n, n) their cosines, `tails` the tails' bytes."""

    texts: list[Text]
    steps: Steps
    keys: NDArray[np.int8]
    similarity: Floats
    tails: list[bytes]


@dataclass(frozen=True, slots=True)
class Visit:
    """A device writes one of the texts. `kind`: whether its question is new, another device's in other words, or
    exactly another device's."""

    text: int
    device: int
    kind: str


def recorded(prompts: Sequence[Prompt], steps: Sequence[Steps], key: Callable[[Floats], Key]) -> Recorded:
    joined = Steps(
        **{name: np.concatenate([getattr(s, name) for s in steps]) for name in Steps.__dataclass_fields__},
    )
    ends = np.cumsum([len(s.u) for s in steps]).tolist()
    texts = [Text(p, range(end - len(s.u), end)) for p, s, end in zip(prompts, steps, ends, strict=True)]
    keys = np.stack([key(hidden.astype(np.float32)) for hidden in joined.hidden])
    unit = keys.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return Recorded(
        texts, joined, keys, np.clip(unit @ unit.T, -1.0, 1.0), [tail(recent.tolist()) for recent in joined.recent]
    )


def visits(texts: Sequence[Text], seed: int) -> list[Visit]:
    """The devices take turns: each gets its part of the new questions, and among them the previous device's in other
    words and a quarter of them once more as they were. The first device repeats the last one's at the end."""
    rng = random.Random(seed)
    documents = sorted({text.prompt.document for text in texts})
    rng.shuffle(documents)
    part = {document: at * DEVICES // len(documents) for at, document in enumerate(documents)}
    turns: list[list[Visit]] = [[] for _ in range(DEVICES + 1)]
    for index, text in enumerate(texts):
        device = part[text.prompt.document]
        following = (device + 1) % DEVICES
        if text.prompt.wording:
            turns[device + 1].append(Visit(index, following, REWORDED))
            continue
        turns[device].append(Visit(index, device, NEW))
        if rng.random() < _REPEATED_SHARE:
            turns[device + 1].append(Visit(index, following, REPEATED))
    for turn in turns:
        rng.shuffle(turn)
    return [visit for turn in turns for visit in turn]
