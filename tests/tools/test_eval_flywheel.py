"""The flywheel evaluation's own arithmetic, on a student that learns by rote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from protocol.errors import ConfigError
from tools.eval.flywheel import report
from tools.eval.flywheel.play import ARMS, Arm, Play, Played
from tools.eval.flywheel.stream import ROUNDS, Stream, drawn
from tools.eval.flywheel.student import View
from tools.eval.flywheel.thresholds import Thresholds
from tools.eval.flywheel.traffic import Traffic

LABELS, TEXTS, DEVICES = 4, 400, 4


@dataclass(frozen=True)
class Lesson:
    row: int
    label: int


@dataclass
class Student:
    """Knows nothing (and is unsure) of a label until it had three lessons about it; then it is right and sure. `file`:
    what an adapter's file would be."""

    label: np.ndarray[Any, Any]
    file_of: Path
    adapters: dict[str, frozenset[int]] = field(default_factory=lambda: {"": frozenset()})
    trained: list[list[Lesson]] = field(default_factory=list)
    recipe: Any = None

    def __post_init__(self) -> None:
        self.recipe = type("Recipe", (), {"rank": 8})

    def view(self, adapter: str, rows: np.ndarray[Any, Any]) -> View:
        x = np.full((len(rows), LABELS), 1.0 / LABELS, np.float32)
        for at, row in enumerate(rows.tolist()):
            if int(self.label[row]) in self.adapters[adapter]:
                x[at] = 0.02
                x[at, self.label[row]] = 0.94
            else:
                x[at, 0] += 0.01
        keys = np.random.default_rng(0).integers(-127, 128, (TEXTS, 128)).astype(np.int8)
        return View(x, keys[rows])

    def lesson(self, row: int, y: np.ndarray[Any, Any]) -> Lesson:
        return Lesson(row, int(y.argmax()))

    def correction(self, row: int, label: int, weight: float) -> Lesson:
        return Lesson(row, label)

    def train(self, lessons: Sequence[Lesson], start: str, seed: int, epochs: float) -> str:
        self.trained.append(list(lessons))
        labels, counts = np.unique([lesson.label for lesson in lessons], return_counts=True)
        known = self.adapters[start] | {int(label) for label, n in zip(labels, counts, strict=True) if n >= 3}
        return self._named(known)

    def _named(self, known: frozenset[int]) -> str:
        name = "".join(map(str, sorted(known))) or "nothing"
        self.adapters[name] = frozenset(known)
        return name

    def merged(self, offered: Sequence[tuple[str, float]]) -> str:
        return self._named(frozenset().union(*(self.adapters[name] for name, _ in offered)))

    def file(self, adapter: str) -> Path:
        return self.file_of


class Costs(Traffic):
    def __init__(self) -> None:
        self.entry = 10

    def asked(self, row: int, draft: int, said: int) -> int:
        return 1000


@pytest.fixture
def stream() -> Stream:
    rng = np.random.default_rng(1)
    label = rng.integers(0, LABELS, TEXTS)
    said = np.where(rng.random(TEXTS) < 0.8, label, rng.integers(0, LABELS, TEXTS))
    y = np.full((TEXTS, LABELS), 0.02, np.float32)
    y[np.arange(TEXTS), said] = 0.94
    return drawn(label, y, devices=DEVICES, alpha=0.5, corrections=0.1, seed=3)


def play(name: str, stream: Stream, tmp_path: Path, start: float = 0.0) -> tuple[Played, Student]:
    file = tmp_path / "adapter"
    file.write_bytes(bytes(5000))
    student = Student(stream.label, file)
    arm = next(arm for arm in ARMS if arm.name == name)
    return Play(arm, stream, cast(Any, student), Costs(), Thresholds(DEVICES, 0.3, start), seed=0).run(), student


def test_every_text_goes_to_one_device_and_into_one_round(stream: Stream) -> None:
    assert sorted(np.concatenate(stream.rounds).tolist()) == list(range(TEXTS))
    assert len(stream.rounds) == ROUNDS
    shares = np.stack([np.bincount(stream.label[stream.device == d], minlength=LABELS) for d in range(DEVICES)])
    assert (shares.sum(axis=1) >= ROUNDS).all()
    assert (shares.max(axis=1) / shares.sum(axis=1)).mean() > 0.35, "devices have topics of their own"


def test_too_few_texts_for_the_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        drawn(np.zeros(30, np.intp), np.ones((30, 2), np.float32), devices=4, alpha=1.0, corrections=0.0, seed=0)


def test_thresholds_alone_go_on_asking_where_the_model_stays_unsure(stream: Stream, tmp_path: Path) -> None:
    played, student = play("thresholds", stream, tmp_path)
    last = np.concatenate(stream.rounds[-2:])
    assert played.llm[last].mean() > 0.5
    assert not student.trained
    assert (played.answer == np.where(played.llm, stream.said, played.alone)).all()


@pytest.mark.parametrize("name", ["local", "federated"])
def test_with_adapters_devices_ask_less_and_know_more(name: str, stream: Stream, tmp_path: Path) -> None:
    played, _ = play(name, stream, tmp_path)
    first, last = stream.rounds[0], np.concatenate(stream.rounds[-2:])
    assert played.llm[first].mean() > 0.7
    assert played.llm[last].mean() < 0.25
    assert (played.alone == stream.label)[last].mean() > 0.9


def test_what_the_fleet_learned_serves_a_device_that_never_saw_it(stream: Stream, tmp_path: Path) -> None:
    local, _ = play("local", stream, tmp_path)
    federated, _ = play("federated", stream, tmp_path)
    early = stream.rounds[2]
    assert (federated.alone == stream.label)[early].mean() >= (local.alone == stream.label)[early].mean()
    ratio = report.items_ratio(stream, local, federated)
    assert ratio["ratio"] is not None
    assert ratio["ratio"] <= 1.0


def test_held_out_lessons_are_never_trained_on(stream: Stream, tmp_path: Path) -> None:
    _, student = play("federated_corrected", stream, tmp_path)
    rows = {lesson.row for lessons in student.trained for lesson in lessons}
    assert rows
    assert all(row % 5 for row in rows)


def test_corrections_replace_what_the_llm_said(stream: Stream, tmp_path: Path) -> None:
    _, student = play("local_corrected", stream, tmp_path)
    taught = {lesson.row: lesson.label for lessons in student.trained for lesson in lessons}
    told = [row for row in taught if stream.told[row]]
    assert told
    assert all(taught[row] == stream.label[row] for row in told)
    assert any(taught[row] != stream.label[row] for row in taught if not stream.told[row]), "the LLM errs"


def test_all_bytes_are_counted(stream: Stream, tmp_path: Path) -> None:
    played, student = play("federated", stream, tmp_path)
    last = played.bytes[-1]
    assert last["cloud"] == 1000 * int(played.llm.sum())
    rounds = last["adapters"] // 5000
    assert rounds * 5000 == last["adapters"]
    assert rounds > len(student.trained), "down as well as up"
    assert last["thresholds"] > 0
    for a, b in zip(played.bytes, played.bytes[1:], strict=False):
        assert sum(a.values()) <= sum(b.values())


def test_the_reference_arms(stream: Stream) -> None:
    draft = np.zeros(TEXTS, np.intp)
    llm = report.reference(stream, Costs(), llm=True, draft=draft)
    slm = report.reference(stream, Costs(), llm=False, draft=draft)
    arm = report.arm(stream, "llm", "LLM only", llm, llm, 0)
    assert arm["last_fifth"]["above_llm"] == 0.0
    assert [point["llm_share"] for point in arm["points"]] == [1.0] * ROUNDS
    assert arm["points"][-1]["bytes_total"] == 1000 * TEXTS
    assert report.points(stream, slm)[-1]["bytes_total"] == 0


def test_a_claim_needs_both_accuracy_and_few_questions(stream: Stream, tmp_path: Path) -> None:
    draft = np.zeros(TEXTS, np.intp)
    llm = report.reference(stream, Costs(), llm=True, draft=draft)
    arms = {name: report.arm(stream, name, name, llm, llm, 0) for name in ("federated", "federated_corrected")}
    played = dict.fromkeys(("local", "federated", "local_corrected", "federated_corrected"), llm)
    assert not report.claims(arms, stream, played)["federated"]["holds"], "as right as the LLM, since it always asks"


def test_arms_have_names_of_their_own() -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    assert all(isinstance(arm, Arm) for arm in ARMS)


def test_devices_that_begin_at_zero_ask_about_everything_at_first(stream: Stream, tmp_path: Path) -> None:
    played, _ = play("thresholds", stream, tmp_path)
    assert played.llm[stream.rounds[0]].all()
    played, _ = play("thresholds", stream, tmp_path, start=1.0)
    assert played.llm[stream.rounds[0]].mean() < 0.2


def test_a_new_adapter_begins_with_the_threshold_of_the_one_before() -> None:
    thresholds = Thresholds(2, 0.5, 0.0)
    for notes in thresholds.notes:
        for u in np.linspace(0.0, 1.0, 60):
            notes.answered(float(u), float(u > 0.6), 1.0, 1.0, bool(u > 0.6))
    thresholds.learn()
    learned = thresholds.tau[0]
    assert 0.3 < learned < 0.9
    thresholds.adapted(0, "an adapter")
    thresholds.learn()
    assert thresholds.tau[0] == pytest.approx(learned, abs=0.05)
