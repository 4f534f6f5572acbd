"""The memory of a cluster in one space, by the product's key, rule and evidence, with exact search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agent.memory.base import Neighbour
from agent.memory.key import TAILS
from agent.memory.rule import NEIGHBOURS, Candidate, judge
from agent.memory.rule_evidence import BOUND, Evidence

HITS_AUDITED = 0.05  # agent/config.py: memory.audit

Keys = NDArray[np.int8]


class Remembered:
    """What devices that share a space have learned. All prompts end alike, so tails are always the same."""

    def __init__(self) -> None:
        self._keys: list[Keys] = []
        self._units: list[NDArray[np.float32]] = []
        self._said: list[int] = []
        self.evidence = Evidence(BOUND)

    def look(self, key: Keys, x: NDArray[np.float32], draft: int) -> Candidate | None:
        if not self._said:
            return None
        similarity = np.stack(self._units) @ _unit(key)
        best = np.argsort(-similarity, kind="stable")[:NEIGHBOURS]
        near = [
            Neighbour(at, float(similarity[at]), TAILS[-1], self._said[at], 1.0, 1, 1.0, b"", self._keys[at])
            for at in best.tolist()
        ]
        return judge(near, lambda label: float(x[label]), draft, self.evidence)

    @property
    def audited(self) -> float:
        """The share of hits that the LLM is asked about all the same."""
        return max(HITS_AUDITED, self.evidence.audit_rate)

    def learn(self, key: Keys, said: int, draft: int, candidate: Candidate | None, propensity: float) -> None:
        """The LLM has answered."""
        if candidate is not None:
            self.evidence.note(
                candidate.score,
                memory_right=candidate.token == said,
                draft_right=draft == said,
                agree=candidate.token == draft,
                propensity=propensity,
            )
        self._keys.append(key)
        self._units.append(_unit(key))
        self._said.append(said)


def _unit(key: Keys) -> NDArray[np.float32]:
    wide = key.astype(np.float32)
    unit: NDArray[np.float32] = wide / max(float(np.linalg.norm(wide)), 1e-6)
    return unit
