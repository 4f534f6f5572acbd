"""The stream: who gets which text when, and what the LLM and the user have to say of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ConfigError
from tools.eval.fleets import owners

ROUNDS = 10  # points of each curve; the last fifth is two of them
_LEAST = ROUNDS  # texts of a device: one a round

Rows = NDArray[np.intp]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stream:
    """n texts in the order in which they come. `device` (n,): who gets each; `label` (n,): the right one; `y` (n, K):
    the LLM's distribution over the labels; `told` (n,): whether the user will say what is right, once an answer is
    there. `rounds`: rows of each round."""

    device: Rows
    label: Rows
    y: Floats
    told: NDArray[np.bool_]
    rounds: list[Rows]
    devices: int

    def of(self, device: int, rows: Rows) -> Rows:
        mine: Rows = rows[self.device[rows] == device]
        return mine

    @property
    def said(self) -> Rows:
        """(n,) The LLM's label."""
        said: Rows = self.y.argmax(axis=1)
        return said


def drawn(label: Rows, y: Floats, *, devices: int, alpha: float, corrections: float, seed: int) -> Stream:
    """Topics are spread over devices as in the other evaluations: a Dirichlet distribution per label. Raises
    ConfigError if there are too few texts."""
    n = len(label)
    if n < 2 * devices * _LEAST:
        raise ConfigError(f"{n} texts are too few for {devices} devices: at least {2 * devices * _LEAST} are needed")
    rng = np.random.default_rng(seed)
    device = owners(label, np.ones(n, bool), devices, alpha, _LEAST, rng)
    told = rng.random(n) < corrections
    cuts = np.linspace(0, n, ROUNDS + 1).astype(int)
    return Stream(device, label, y, told, [np.arange(a, b) for a, b in pairwise(cuts)], devices)
