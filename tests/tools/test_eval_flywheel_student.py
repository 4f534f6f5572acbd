"""What the flywheel evaluation counts on in a student holds for the real one, and for the one that learns by rote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.adapt.recipe import Recipe
from tests.tools.test_eval_flywheel import Student as ByRote
from tools.eval.flywheel.student import Student
from tools.eval.table import Dataset, Item

TEXTS = [
    ("A berth for the night, please.", 0),
    ("Where may we lie alongside until noon?", 0),
    ("Is there room at the quay for twelve metres?", 0),
    ("We need two hundred litres of diesel.", 1),
    ("Where can I fill my tanks?", 1),
    ("Do you sell petrol on Sundays?", 1),
]
DATA = Dataset(("berth", "fuel"), tuple(Item(text, label) for text, label in TEXTS))
ROWS = np.arange(len(TEXTS))


@pytest.fixture(scope="module", params=["by rote", "real"])
def student(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("student")
    if request.param == "real":
        return Student(smollm2, DATA, Recipe(rank=4), folder, 0, lambda line: None)
    folder.joinpath("adapter").write_bytes(bytes(5000))
    return ByRote(np.array([item.label for item in DATA.items]), folder / "adapter")


def taught(student: Any, label: int, start: str = "") -> str:
    """The LLM said so of one of the texts about `label`, and users of the others."""
    first, *others = (row for row, item in enumerate(DATA.items) if item.label == label)
    lessons = [student.lesson(first, np.eye(2, dtype=np.float32)[label])]
    lessons += [student.correction(row, label, 4.0) for row in others]
    made: str = student.train(lessons, start, 0, 4.0)
    return made


def belief(student: Any, adapter: str, label: int) -> float:
    """In what was taught, of the texts that it was taught of; mean."""
    return float(student.view(adapter, ROWS[[item.label == label for item in DATA.items]]).x[:, label].mean())


def test_a_view_is_a_distribution_and_a_key_of_each_text(student: Any) -> None:
    view = student.view("", ROWS)
    assert view.x.shape[0] == view.keys.shape[0] == len(ROWS)
    assert np.allclose(view.x.sum(axis=1), 1.0, atol=0.02)
    assert view.keys.dtype == np.int8
    assert view.keys.shape[1] == 128
    again = student.view("", ROWS)
    assert (again.x == view.x).all()
    assert (again.keys == view.keys).all()


@pytest.mark.parametrize("label", [0, 1])
def test_lessons_are_believed_and_the_same_ones_give_the_same_adapter(student: Any, label: int) -> None:
    made = taught(student, label)
    assert belief(student, made, label) > max(0.6, belief(student, "", label))
    assert student.file(made).stat().st_size > 1000
    assert taught(student, label) == made


def test_what_is_merged_has_learned_from_each(student: Any) -> None:
    both = student.merged([(taught(student, label), 3.0) for label in (0, 1)])
    one = student.merged([(taught(student, 1), 3.0)])
    assert belief(student, one, 1) > max(0.6, belief(student, "", 1))
    assert belief(student, both, 0) > belief(student, one, 0)
