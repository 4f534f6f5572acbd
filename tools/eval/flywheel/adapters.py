"""The adapters of an arm: when they are trained, on what, and which of them is let in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from agent.adapt.lesson import Lesson
from tools.eval.flywheel.stream import Stream
from tools.eval.flywheel.student import Student

if TYPE_CHECKING:
    from tools.eval.flywheel.play import Arm

LEAST = 8  # new lessons of a device
GROWTH = {"local": 1.0, "federated": 0.34}  # of what the last adapter was trained on, that has to be new
EPOCHS = {
    "local": 6.0,
    "federated": 3.0,
}  # of one training; the fleet's rounds are more, and each goes on from the last
HELD = 5  # one lesson in so many is never trained on, but judges
CORRECTION = 4.0  # a correction's weight beside an answer of the LLM


class Adapting:
    """`serving`: the adapter that each device writes with, "" for none. `bytes`: of files that travelled."""

    def __init__(self, arm: Arm, stream: Stream, student: Student, seed: int) -> None:
        self.serving = [""] * stream.devices
        self.bytes = 0
        self.gates: list[dict[str, object]] = []
        self._how = arm.adapters
        self._stream = stream
        self._student = student
        self._seed = seed
        self._lessons: list[dict[int, bool]] = [{} for _ in range(stream.devices)]  # row: is it a correction?
        self._trained = [0] * stream.devices

    def heard(self, device: int, row: int) -> None:
        self._lessons[device].setdefault(row, False)

    def corrected(self, device: int, row: int) -> None:
        self._lessons[device][row] = True

    def learn(self, at: int) -> list[int]:
        """After round `at`: the devices that have another adapter now."""
        if self._how == "local":
            due = [
                device for device, rows in enumerate(self._lessons) if self._due(len(rows), self._trained[device], 1)
            ]
            return [device for device in due if self._alone(device, at)]
        total, trained = sum(map(len, self._lessons)), sum(self._trained)
        if self._how == "federated" and self._due(total, trained, self._stream.devices):
            return self._together(at)
        return []

    def _due(self, have: int, trained: int, devices: int) -> bool:
        return have - trained >= max(LEAST * devices, GROWTH[self._how] * trained)

    def _alone(self, device: int, at: int) -> bool:
        self._trained[device] = len(self._lessons[device])
        made = self._student.train(
            self._lessons_of(device, held=False), self.serving[device], self._seed + at, EPOCHS["local"]
        )
        return self._gate(device, made, at)

    def _together(self, at: int) -> list[int]:
        offered = []
        for device in range(self._stream.devices):
            lessons = self._lessons_of(device, held=False)
            self._trained[device] = len(self._lessons[device])
            if lessons:
                made = self._student.train(lessons, self.serving[device], self._seed + at, EPOCHS["federated"])
                self.bytes += self._student.file(made).stat().st_size
                offered.append((made, float(len(lessons))))
        agreed = self._student.merged(offered)
        self.bytes += self._student.file(agreed).stat().st_size * self._stream.devices
        return [device for device in range(self._stream.devices) if self._gate(device, agreed, at)]

    def _lessons_of(self, device: int, *, held: bool) -> list[Lesson]:
        rows = self._rows(device, held=held)
        return [self._lesson(device, row) for row in rows]

    def _rows(self, device: int, *, held: bool) -> list[int]:
        return [row for row in self._lessons[device] if (row % HELD == 0) is held]

    def _lesson(self, device: int, row: int) -> Lesson:
        if self._lessons[device][row]:
            return self._student.correction(row, int(self._stream.label[row]), CORRECTION)
        return self._student.lesson(row, self._stream.y[row])

    def _gate(self, device: int, made: str, at: int) -> bool:
        """Is the candidate better at lessons that no adapter of this device was trained on?"""
        rows = np.array(self._rows(device, held=True), np.intp)
        before, after = (self._loss(device, rows, adapter) for adapter in (self.serving[device], made))
        better = bool(after < before)
        self.gates.append({"round": at, "device": device, "held": len(rows), "before": before, "after": after})
        if better:
            self.serving[device] = made
        return better

    def _loss(self, device: int, rows: np.ndarray, adapter: str) -> float:
        if not len(rows):
            return 0.0 if adapter else 1.0  # nothing to judge by: in
        x = np.log(np.maximum(self._student.view(adapter, rows).x, 1e-6))
        wanted = [
            np.eye(x.shape[1])[self._stream.label[row]] if self._lessons[device][row] else self._stream.y[row]
            for row in rows.tolist()
        ]
        return float(-(np.stack(wanted) * x).sum(axis=1).mean())
