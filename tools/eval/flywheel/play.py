"""One arm's way along the stream: who answers each text, what that teaches, and what all of it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.memory.key import KEY_BYTES
from agent.policy import ThresholdPolicy, Why
from tools.eval.flywheel.adapters import Adapting
from tools.eval.flywheel.remembered import Remembered
from tools.eval.flywheel.stream import Rows, Stream
from tools.eval.flywheel.student import Student, View
from tools.eval.flywheel.thresholds import AUDIT, Thresholds
from tools.eval.flywheel.traffic import Traffic

assert KEY_BYTES  # the width of View.keys


@dataclass(frozen=True, slots=True)
class Arm:
    """`memory`: what was escalated is looked up first. `adapters`: none, each device's own, or the fleet's.
    `corrected`: users say now and then what is right."""

    name: str
    title: str
    memory: bool = False
    adapters: str = "none"
    corrected: bool = False


ARMS = (
    Arm("thresholds", "thresholds only"),
    Arm("memory", "plus memory", memory=True),
    Arm("local", "plus each device's own adapter", memory=True, adapters="local"),
    Arm("federated", "plus the fleet's adapter", memory=True, adapters="federated"),
    Arm("local_corrected", "own adapter, users correct", memory=True, adapters="local", corrected=True),
    Arm("federated_corrected", "fleet's adapter, users correct", memory=True, adapters="federated", corrected=True),
)


@dataclass(slots=True)
class Played:
    """Of n texts: `llm`: the LLM was asked; `answer`: the label that the user got; `alone`: what the device would have
    written by itself. By rounds: `bytes` so far, by what they were for; `adapters`: what each device writes with."""

    llm: NDArray[np.bool_]
    memory: NDArray[np.bool_]
    answer: Rows
    alone: Rows
    bytes: list[dict[str, int]] = field(default_factory=list)
    adapters: list[list[str]] = field(default_factory=list)
    gates: list[dict[str, object]] = field(default_factory=list)


class Play:
    def __init__(
        self, arm: Arm, stream: Stream, student: Student, traffic: Traffic, thresholds: Thresholds, seed: int
    ) -> None:
        n = len(stream.label)
        self.arm = arm
        self._stream = stream
        self._student = student
        self._traffic = traffic
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._thresholds = thresholds
        self._memory: dict[str, Remembered] = {}  # by adapter, whose states make its keys
        self._adapting = Adapting(arm, stream, student, seed)
        self.played = Played(np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, np.intp), np.zeros(n, np.intp))
        self._peers = self._cloud = 0

    def run(self) -> Played:
        for at, rows in enumerate(self._stream.rounds):
            for device in range(self._stream.devices):
                self._serve(device, self._stream.of(device, rows))
            for device in self._adapting.learn(at):
                self._thresholds.adapted(device, self._adapting.serving[device])
            self._thresholds.learn()
            self.played.adapters.append(list(self._adapting.serving))
            self.played.bytes.append(
                {
                    "cloud": self._cloud,
                    "thresholds": self._thresholds.bytes,
                    "memory": self._peers,
                    "adapters": self._adapting.bytes,
                }
            )
        self.played.gates = self._adapting.gates
        return self.played

    def _serve(self, device: int, rows: Rows) -> None:
        if not len(rows):
            return
        serving = self._adapting.serving[device]
        view = self._student.view(serving, rows)
        for at, row in enumerate(rows.tolist()):
            self._answer(device, row, at, view, serving)

    def _answer(self, device: int, row: int, at: int, view: View, serving: str) -> None:
        x, key = view.x[at], view.keys[at]
        draft, said = int(x.argmax()), int(self._stream.said[row])
        u = float(np.clip(-(x * np.log(np.maximum(x, 1e-30))).sum() / np.log(len(x)), 0.0, 1.0))
        played, notes = self.played, self._thresholds.notes[device]
        played.alone[row] = played.answer[row] = draft
        remembered = self._memory.setdefault(
            serving if self.arm.adapters != "local" else f"{device} {serving}", Remembered()
        )
        decided = ThresholdPolicy(self._thresholds.tau[device], AUDIT).decide(u, self._seed, row)
        escalated, propensity, candidate = decided.why is Why.ESCALATE, decided.propensity, None
        if escalated and self.arm.memory:
            candidate = remembered.look(key, x, draft)
            if candidate is not None and candidate.hit:
                propensity = remembered.audited
        asked = decided.why is Why.AUDIT or (escalated and self._rng.random() < propensity)
        if not asked and not escalated:
            notes.keep(u)
        if not asked and escalated and candidate is not None:
            played.answer[row], played.memory[row] = candidate.token, True
        if asked:
            played.llm[row], played.answer[row] = True, said
            self._cloud += self._traffic.asked(row, draft, said)
            differs = draft != said  # beta of a classifier, which answers greedily: rejected surely or not at all
            notes.answered(u, float(differs), propensity, min(propensity, decided.least), differs)
            self._adapting.heard(device, row)
            if self.arm.memory and escalated:
                remembered.learn(key, said, draft, candidate, propensity)
                self._peers += self._traffic.entry * self._stream.devices
        if self.arm.corrected and self._stream.told[row]:
            self._adapting.corrected(device, row)
