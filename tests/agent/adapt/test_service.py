"""The agent that learns by itself: when it begins, what it does with what comes of it, and what stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.adapt import job, session
from agent.adapt.idle import Machine
from agent.adapt.job import Job, Result, Trained, Verdict
from agent.adapt.lesson import Lesson, decode
from agent.adapt.lessons import Lessons
from agent.adapt.service import Adapting, Status, status_of
from agent.adapt.session import LOCK, Limits, Session, erase, unlearned
from agent.adapt.store import OWN, PRIVATE, AdapterStore
from agent.adapt.supervise import Stopped, Supervisor
from models.adapter import write
from protocol.errors import StoreInUse, TrainingError
from protocol.folder_lock import FolderLock
from tests.agent.adapt.adapters import MODEL, small, small_file
from tests.agent.adapt.toy import toy_lessons
from tests.protocol.transport.worlds import wait_until

LIMITS = Limits(memory=10**9, rank=8, step_s=10.0, threads=1)
ENOUGH = 64


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Canned(Supervisor):
    """Trains nothing: writes the next adapter, and says of it what the test wants. `go` holds it up."""

    def __init__(self) -> None:
        super().__init__()
        self.verdicts: list[Verdict | TrainingError] = []
        self.jobs: list[tuple[str, Job, list[Lesson]]] = []
        self.paused_now = False
        self.go = threading.Event()
        self.go.set()
        self.running = threading.Event()
        self._ended = threading.Event()

    def run(self, folder: Path) -> Result:
        given = job.read(folder, job.JOB, Job)
        assert given is not None
        self.jobs.append((folder.name, given, decode((folder / job.LESSONS).read_bytes())))
        self.running.set()
        while not self.go.wait(0.01):
            if self._ended.is_set():
                raise Stopped
        said = self.verdicts.pop(0) if self.verdicts else Verdict(True, "better", 12)
        if isinstance(said, TrainingError):
            raise said
        if given.recipe is None:
            return Result(said)
        id = write(small(len(self.jobs)), folder / job.CANDIDATE)
        return Result(said, Trained(id, 2, 80, 10, 1.0, 1.0, 10**8, 10**8))

    def pause(self) -> None:
        self.paused_now = True

    def resume(self) -> None:
        self.paused_now = False

    def close(self) -> None:
        self._ended.set()


class World:
    """A device's learning, with a clock and a machine that the test moves."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.store = AdapterStore(folder, MODEL)
        self.lessons = Lessons(folder / "lessons", MODEL)
        self.supervisor = Canned()
        self.root = root
        self.changes: list[dict[str, Path]] = []
        self.adapting: Adapting | None = None

    def start(self, *, train: bool = True) -> Adapting:
        self.adapting = Adapting(
            self.folder,
            Path("model.gguf"),
            self.store,
            self.lessons,
            Machine(self.root, 75.0),
            lambda: LIMITS,
            train=train,
            enough=ENOUGH,
            idle_s=60.0,
            on_change=self.changes.append,
            clock=self.clock,
            supervisor=self.supervisor,
        )
        self.adapting.start()
        return self.adapting

    @property
    def status(self) -> Status:
        assert self.adapting is not None
        return self.adapting.status

    def idle(self) -> None:
        self.clock.now += 1000.0

    def hears(self, change: Callable[[dict[str, Path]], bool]) -> None:
        wait_until(lambda: self.changes and change(self.changes[-1]), f"{self.status}")

    def close(self) -> None:
        if self.adapting is not None:
            self.adapting.close()
        self.lessons.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("agent.adapt.service._LOOK_S", 0.02)
    made = World(tmp_path / "adapters", tmp_path / "root")
    yield made
    made.close()


def test_enough_lessons_and_an_idle_machine_make_an_adapter(world: World) -> None:
    world.lessons.add_all(toy_lessons(ENOUGH - 1))
    world.start()
    world.idle()
    wait_until(lambda: world.status.waits == "too few lessons")
    world.lessons.add_all(toy_lessons(1))
    world.hears(lambda in_use: list(in_use) == [OWN])
    (kept,) = world.store.adapters()
    assert (kept.lessons, kept.private) == (80, False)
    assert kept.verdict is not None
    assert kept.verdict.passed
    wait_until(lambda: world.status.waits == "too few lessons")
    assert (world.status.trainings, world.status.committed, world.status.new) == (1, 1, 0)
    assert len(world.supervisor.jobs) == 1, "the same lessons are not trained on again"
    assert not list(world.folder.glob("work-*")), "no copy of a lesson is left"


def test_it_waits_for_requests_to_end_and_stops_when_one_comes(world: World) -> None:
    world.lessons.add_all(toy_lessons(ENOUGH))
    adapting = world.start()
    adapting.activity(1)
    world.idle()
    wait_until(lambda: world.status.waits == "in use")
    assert world.supervisor.paused_now
    world.supervisor.go.clear()
    adapting.activity(0)
    world.idle()
    assert world.supervisor.running.wait(30)
    wait_until(lambda: world.status.doing == "training")
    wait_until(lambda: not world.supervisor.paused_now)
    adapting.activity(1)
    assert world.supervisor.paused_now, "at once, by whoever took the request"
    wait_until(lambda: world.status.doing == "paused" and world.status.waits == "in use")
    adapting.activity(0)
    world.clock.now += 59.0
    wait_until(lambda: world.status.doing == "paused")
    world.idle()
    wait_until(lambda: world.status.doing == "training" and not world.supervisor.paused_now)
    world.supervisor.go.set()
    world.hears(lambda in_use: OWN in in_use)


def test_it_does_not_train_while_hot(world: World) -> None:
    zone = world.root / "sys/class/thermal/thermal_zone0/temp"
    zone.parent.mkdir(parents=True)
    zone.write_text("80000")
    world.lessons.add_all(toy_lessons(ENOUGH))
    world.start()
    world.idle()
    wait_until(lambda: world.status.waits == "hot")
    assert not world.supervisor.jobs
    zone.write_text("40000")
    world.idle()
    world.hears(lambda in_use: OWN in in_use)


def test_what_the_gate_refuses_changes_nothing(world: World) -> None:
    world.supervisor.verdicts = [Verdict(False, "not better", 12)]
    world.lessons.add_all(toy_lessons(ENOUGH))
    world.start()
    world.idle()
    wait_until(lambda: world.status.trainings == 1)
    assert world.store.in_use() == {}
    (kept,) = world.store.adapters()
    assert kept.dropped
    assert world.status.last is not None
    assert world.status.last.verdict == kept.verdict


def test_private_lessons_teach_a_second_adapter_that_nobody_else_gets(world: World) -> None:
    world.lessons.add_all([*toy_lessons(100), *toy_lessons(60, private=True)])
    world.start()
    world.idle()
    wait_until(lambda: world.status.trainings == 1)
    (first, of_shared, shared), (second, of_all, everything) = world.supervisor.jobs
    assert (first, second) == ("work-own", "work-own.private")
    assert not any(lesson.private for lesson in shared)
    assert len(everything) == 160
    assert of_shared.start == ""
    assert of_all.start == str(world.store.in_use()[OWN])
    manifests = {slot: world.store.manifest(path.stem) for slot, path in world.store.in_use().items()}
    assert [(slot, kept.private) for slot, kept in sorted(manifests.items()) if kept] == [(OWN, False), (PRIVATE, True)]


def test_only_private_lessons_teach_nothing_that_is_shared(world: World) -> None:
    world.lessons.add_all(toy_lessons(ENOUGH + 40, private=True))
    world.start()
    world.idle()
    wait_until(lambda: world.status.trainings == 1)
    assert list(world.store.in_use()) == [PRIVATE]


def test_a_failure_is_told_and_tried_again_ever_more_rarely(world: World) -> None:
    world.supervisor.verdicts = [TrainingError("no finite loss"), TrainingError("no finite loss")]
    world.lessons.add_all(toy_lessons(ENOUGH))
    world.start()
    world.idle()
    wait_until(lambda: world.status.waits == "failed")
    assert world.status.error == "no finite loss"
    world.clock.now += 61.0
    wait_until(lambda: len(world.supervisor.jobs) == 2)
    wait_until(lambda: world.status.waits == "failed")
    world.clock.now += 121.0
    world.hears(lambda in_use: OWN in in_use)


def test_adapters_from_elsewhere_are_judged_and_used_in_their_slot(world: World, tmp_path: Path) -> None:
    adapting = world.start(train=False)
    world.supervisor.verdicts = [Verdict(True, "no worse", 0), Verdict(False, "worse", 9), TrainingError("gone")]
    for seed in (50, 51, 52, 53):
        adapting.consider(small_file(tmp_path, seed), "fleet.0")
    world.idle()
    wait_until(lambda: len(world.supervisor.jobs) == 4)
    wait_until(lambda: world.status.waits == "switched off")
    assert [one.dropped for one in world.store.adapters()] == [False, True, False]
    assert world.status.committed == 2
    assert world.store.in_use()["fleet.0"].stem == world.store.adapters()[-1].id


def test_a_change_by_another_process_is_noticed(world: World, tmp_path: Path) -> None:
    world.start(train=False)
    elsewhere = AdapterStore(world.folder, MODEL)
    kept = elsewhere.add(small_file(tmp_path, 9), "file")
    elsewhere.commit(OWN, kept.id, "by hand")
    world.hears(lambda in_use: in_use == {OWN: elsewhere.path(kept.id)})
    elsewhere.rollback()
    world.hears(lambda in_use: in_use == {})


def test_what_is_in_use_already_is_told_of_before_the_first_request(world: World, tmp_path: Path) -> None:
    kept = world.store.add(small_file(tmp_path, 9), "file")
    world.store.commit(OWN, kept.id, "")
    world.start()
    assert world.changes == [{OWN: world.store.path(kept.id)}]


def test_an_adapter_that_cannot_be_attached_ends_nothing(world: World, tmp_path: Path) -> None:
    world.changes = Refusing()
    world.start()
    kept = world.store.add(small_file(tmp_path, 9), "file")
    world.store.commit(OWN, kept.id, "")
    wait_until(lambda: len(world.changes) == 1)
    world.store.rollback()
    wait_until(lambda: len(world.changes) == 2)


class Refusing(list[dict[str, Path]]):
    """Notes what it is told, and fails."""

    def append(self, in_use: dict[str, Path]) -> None:
        super().append(in_use)
        raise RuntimeError("no room in the engine")


def test_without_torch_it_says_so_and_goes_on_using_adapters(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.adapt.service.installed", lambda: False)
    kept = world.store.add(small_file(tmp_path, 9), "file")
    world.store.commit(OWN, kept.id, "")
    world.lessons.add_all(toy_lessons(ENOUGH))
    world.start()
    world.idle()
    wait_until(lambda: world.status.waits == "not installed")
    assert "pip install 'skerry[train]'" in world.status.error
    world.hears(lambda in_use: OWN in in_use)
    assert not world.supervisor.jobs


def test_while_another_process_trains_it_waits(world: World) -> None:
    lock = FolderLock(world.folder, LOCK, "the training", "device.folder")
    world.lessons.add_all(toy_lessons(ENOUGH))
    world.start()
    world.idle()
    wait_until(lambda: world.status.waits == "training elsewhere")
    lock.close()
    world.hears(lambda in_use: OWN in in_use)


def test_closing_ends_a_training_and_the_next_start_goes_on_with_it(world: World) -> None:
    world.lessons.add_all(toy_lessons(ENOUGH))
    world.supervisor.go.clear()
    world.start()
    world.idle()
    assert world.supervisor.running.wait(30)
    assert world.adapting is not None
    world.adapting.close()
    assert status_of(world.folder).doing == "off"
    work = world.folder / "work-own"
    (work / job.CHECKPOINT).write_text("half-way")
    world.lessons.add_all(toy_lessons(3))
    world.supervisor = Canned()
    world.supervisor.go.clear()
    world.start()
    world.idle()
    assert world.supervisor.running.wait(30)
    assert (work / job.CHECKPOINT).read_text() == "half-way"
    assert len(world.supervisor.jobs[0][2]) == ENOUGH, "what came since is for the next training"


def test_a_training_does_not_go_on_with_lessons_that_were_forgotten(world: World) -> None:
    world.lessons.add_all([*toy_lessons(ENOUGH + 40)])
    world.supervisor.go.clear()
    world.start()
    world.idle()
    assert world.supervisor.running.wait(30)
    assert world.adapting is not None
    world.adapting.close()
    work = world.folder / "work-own"
    (work / job.CHECKPOINT).write_text("half-way")
    world.lessons.forget()
    world.lessons.add_all(toy_lessons(ENOUGH))
    ended = Canned()
    ended.go.clear()
    ended.close()
    with closing(Session(world.folder, Path("model.gguf"), world.store, ended, LIMITS)) as again:
        with pytest.raises(Stopped):
            again.learn(world.lessons.take(private=False), session.Recipe())
    assert not (work / job.CHECKPOINT).exists()
    erase(world.folder)
    assert not work.exists()


def test_two_do_not_train_at_once(world: World) -> None:
    one = Session(world.folder, Path("model.gguf"), world.store, world.supervisor, LIMITS)
    with pytest.raises(StoreInUse, match="in use by process"):
        Session(world.folder, Path("model.gguf"), world.store, world.supervisor, LIMITS)
    one.close()


def test_private_lessons_never_reach_the_shared_slot(world: World) -> None:
    locked = Session(world.folder, Path("model.gguf"), world.store, world.supervisor, LIMITS)
    with pytest.raises(TrainingError, match="private"):
        locked.learn(toy_lessons(100, private=True), session.Recipe(), OWN)
    with pytest.raises(TrainingError, match="too few lessons"):
        locked.learn(toy_lessons(4), session.Recipe(), OWN)
    locked.close()


def test_new_lessons_are_counted_from_the_last_training_even_if_the_store_begins_anew(world: World) -> None:
    world.lessons.add_all(toy_lessons(ENOUGH))
    assert unlearned(world.folder, world.lessons) == ENOUGH
    locked = Session(world.folder, Path("model.gguf"), world.store, world.supervisor, LIMITS)
    assert len(list(locked.learn_all(world.lessons, session.Recipe(), lambda slot: None))) == 1
    locked.close()
    assert unlearned(world.folder, world.lessons) == 0
    fresh = Lessons(world.folder / "other", MODEL)
    fresh.add_all(toy_lessons(5))
    assert unlearned(world.folder, fresh) == 5
    fresh.close()
