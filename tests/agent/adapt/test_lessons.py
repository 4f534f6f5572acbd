"""What the store keeps, in which order, for whom and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from agent.adapt.lessons import Lessons
from protocol.errors import StoreError, TrainingError
from tests.agent.adapt.lessons import MODEL, lesson, numbers

DAY = 86_400.0
SECRET = [70_001, 80_002, 90_003]  # tokens that are told from others in a file


class Clocks:
    def __init__(self) -> None:
        self.now, self.wall = 500.0, 1_760_000_000.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


Build = Callable[..., Lessons]


@pytest.fixture
def build(tmp_path: Path, clocks: Clocks) -> Iterator[Build]:
    made: list[Lessons] = []

    def make(model: str = MODEL, **bounds: float) -> Lessons:
        made.append(
            Lessons(tmp_path / "l", model, clock=lambda: clocks.now, wall=lambda: clocks.wall, **bounds)  # type: ignore[arg-type]
        )
        return made[-1]

    yield make
    for lessons in made:
        lessons.close()


def disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_lessons_are_taken_newest_first_within_bounds(build: Build) -> None:
    lessons = build()
    for number in range(10):
        lessons.add(lesson(number))
    assert [one.tokens[0] for one in lessons.take(False)] == list(range(9, -1, -1))
    assert [one.tokens[0] for one in lessons.take(False, most=3)] == [9, 8, 7]
    assert len(lessons.take(False, most_bytes=100)) in range(1, 6)
    assert lessons.count == 10


def test_a_lesson_comes_back_as_it_was(build: Build) -> None:
    given = lesson(5, "correction", private=True)
    lessons = build()
    lessons.add(given)
    lessons.close()
    assert build().take(True) == [given]


def test_private_lessons_are_taken_for_the_own_adapter_alone(build: Build) -> None:
    lessons = build()
    for number in range(6):
        lessons.add(lesson(number, private=number % 2 == 1))
    assert numbers(lessons, private=False) == [0, 2, 4]
    assert numbers(lessons, private=True) == [0, 1, 2, 3, 4, 5]
    assert lessons.stats().private == 3


def test_lessons_of_another_model_are_kept_and_not_taken(build: Build) -> None:
    build().add(lesson(1))
    other = build("b" * 64)
    other.add(lesson(2))
    assert numbers(other) == [2]
    assert (other.count, other.stats().others) == (1, 1)
    assert numbers(build()) == [1]


def test_the_revision_grows_with_each_lesson_whoever_adds_it(build: Build) -> None:
    ours, theirs = build(), build()
    assert ours.revision == 0
    assert ours.add(lesson()) == 1
    assert theirs.add(lesson()) == 2
    assert theirs.add_all([lesson(), lesson()]) == 2
    assert ours.revision == 4
    ours.forget()
    assert ours.revision == 4
    ours.close()
    assert build().revision == 4


def test_a_lesson_replaces_that_of_the_same_answer(build: Build) -> None:
    lessons = build()
    lessons.add(lesson(1), "first")
    lessons.add(lesson(2), "second")
    lessons.add(lesson(3, private=True), "first")
    lessons.add(lesson(4))
    lessons.add(lesson(5))
    assert numbers(lessons) == [2, 3, 4, 5]
    assert lessons.drop("first") == 1
    assert lessons.drop("first") == 0
    assert numbers(lessons) == [2, 4, 5]


def test_bytes_are_bounded_and_the_oldest_go(build: Build, tmp_path: Path) -> None:
    lessons = build(max_bytes=10**6)
    for number in range(400):
        lessons.add(lesson(number, length=4000, private=number % 3 == 0))
    found = numbers(lessons)
    lessons.close()
    assert len(disk(tmp_path)) <= 10**6
    assert len(found) > 60
    assert found == list(range(400 - len(found), 400))


def test_more_than_the_bound_at_once_is_refused_whole(build: Build) -> None:
    lessons = build(max_bytes=10**6)
    lessons.add(lesson(1))
    with pytest.raises(StoreError, match=r"adapt\.megabytes"):
        lessons.add_all(lesson(number, length=4000) for number in range(400))
    assert numbers(lessons) == [1]


def test_what_makes_no_sense_is_refused_with_all_that_came_with_it(build: Build) -> None:
    lessons = build()
    with pytest.raises(TrainingError):
        lessons.add(lesson(-1))
    with pytest.raises(TrainingError):
        lessons.add_all([lesson(1), lesson(-1)])
    assert (lessons.count, lessons.revision) == (0, 0)


def test_lessons_age_in_running_time(build: Build, clocks: Clocks) -> None:
    lessons = build(max_age=10 * DAY)
    lessons.add(lesson(1))
    clocks.pass_(6 * DAY)
    lessons.add(lesson(2))
    clocks.pass_(5 * DAY)
    assert lessons.tend()
    assert numbers(lessons) == [2]
    assert lessons.stats().oldest == pytest.approx(5 * DAY)


def test_a_clock_that_jumps_makes_nothing_old(build: Build, clocks: Clocks) -> None:
    lessons = build(max_age=10 * DAY)
    lessons.add(lesson(1))
    clocks.wall += 50 * 365 * DAY
    lessons.add(lesson(2))
    lessons.close()
    clocks.wall -= 100 * 365 * DAY
    lessons = build(max_age=10 * DAY)
    lessons.add(lesson(3))
    lessons.close()
    clocks.wall += 70 * 365 * DAY
    lessons = build(max_age=10 * DAY)
    lessons.add(lesson(4))
    assert numbers(lessons) == [1, 2, 3, 4]
    clocks.pass_(11 * DAY)
    lessons.tend()
    assert numbers(lessons) == [], "running time counts on"


@pytest.mark.parametrize(
    ("only", "left"),
    [
        ({}, []),
        ({"source": "cloud"}, [2, 3, 4]),
        ({"private": True}, [1, 2, 4]),
        ({"before": 2.5 * DAY}, [3, 4]),
        ({"source": "example", "private": True}, [1, 2, 4]),
        ({"source": "correction", "private": True}, [1, 2, 3, 4]),
        ({"source": "cloud", "before": 5 * DAY}, [1, 2, 3, 4]),
    ],
)
def test_forgetting_takes_what_it_is_told(
    build: Build, clocks: Clocks, only: dict[str, object], left: list[int]
) -> None:
    lessons = build()
    for given in (lesson(1, "cloud"), lesson(2, "correction"), lesson(3, private=True), lesson(4)):
        lessons.add(given)
        clocks.pass_(DAY)
    assert lessons.forget(**only) == 4 - len(left)  # type: ignore[arg-type]
    assert numbers(lessons) == left


def test_what_is_forgotten_leaves_no_byte_on_the_disk(build: Build, tmp_path: Path) -> None:
    """Also while another process has the store open, and where a lesson was dropped long before."""
    agent, command = build(), build()
    secret = msgspec.msgpack.encode(SECRET)[1:]
    for number in range(300):
        agent.add(lesson(number, length=200))
    for private in (False, True):
        tainted = lesson(0, "cloud", private=private)
        agent.add(type(tainted)([1, *SECRET, *SECRET], tainted.targets, "cloud", private), f"answer-{private}")
    agent.add(lesson(301, length=200))
    assert disk(tmp_path / "l").count(secret) >= 4
    (tmp_path / "l" / "lessons.db.damaged").write_bytes(secret)
    agent.drop("answer-True")
    assert command.forget("cloud") == 1
    assert secret not in disk(tmp_path / "l")
    assert not any(number.to_bytes(4, "big") in disk(tmp_path / "l") for number in SECRET)
    assert len(numbers(agent)) == 301


def test_lessons_are_for_their_owner_alone(build: Build, tmp_path: Path) -> None:
    build().add(lesson())
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "l").iterdir()} == {0}
