"""What peer memory needs to know of tasks whose answer is one step: who says what, and which states are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.memory.key import KeyMaker
from protocol.memory import SPACE_BYTES
from tools.eval.news import Reading

Floats = NDArray[np.float32]
Labels = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Views:
    """Of n steps. `draft`, `said` (n,): the SLM's label and the LLM's. `x` (n, K): the SLM's distribution. `keys`
    (n, 128): as memory sees the SLM's states; `similarity` (n, n): their cosines."""

    draft: Labels
    said: Labels
    x: Floats
    keys: NDArray[np.int8]
    similarity: Floats


def views(of_slm: Sequence[Reading], of_llm: Sequence[Reading]) -> Views:
    x, y = (np.stack([reading.p for reading in found]) for found in (of_slm, of_llm))
    state = np.stack([reading.hidden for reading in of_slm]).astype(np.float32)
    # The statistic of the states themselves serves as well as the calibration text's (docs/memory.md) without a model.
    maker = KeyMaker(bytes(SPACE_BYTES), state.mean(axis=0), state.std(axis=0))
    keys = np.stack([maker.key(one) for one in state])
    unit = keys.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    return Views(x.argmax(axis=1), y.argmax(axis=1), x, keys, np.clip(unit @ unit.T, -1.0, 1.0))
