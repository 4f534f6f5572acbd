"""The worker seen from outside: real processes, really paused and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.adapt import job
from agent.adapt.job import Job, Progress, Result
from agent.adapt.supervise import Stopped, Supervisor
from protocol.errors import BadAdapter, TrainingError
from tests.brokers import ROOT
from tests.protocol.transport.worlds import wait_until


def pretending(mode: str = "") -> Callable[[Path], list[str]]:
    return lambda folder: [sys.executable, "-m", "tests.agent.adapt.fake_worker", str(folder), mode]


def state(pid: int) -> str:
    """As the system sees it: R or S running, T stopped; empty: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Clock:
    """Stands still but for the test; knows how often it was looked at."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now

    def wait_for_looks(self, count: int) -> None:
        enough = self.looks + count
        wait_until(lambda: self.looks >= enough)


class Running:
    """A supervisor at work in a thread."""

    def __init__(self, supervisor: Supervisor, folder: Path) -> None:
        self.supervisor = supervisor
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(folder,))
        self._thread.start()

    def _run(self, folder: Path) -> None:
        try:
            self.result = self.supervisor.run(folder)
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    job.prepare(tmp_path / "work", Job("", None, memory=20), b"")
    return tmp_path / "work"


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A job that does not end while it is watched."""
    job.prepare(tmp_path / "long", Job("", None, memory=100_000), b"")
    return tmp_path / "long"


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor(command=pretending())
    yield made
    made.close()


def begun(folder: Path, step: int = 1) -> None:
    def reached() -> bool:
        progress = job.read(folder, job.PROGRESS, Progress)
        return progress is not None and progress.done >= step

    wait_until(reached)


def test_it_gives_what_the_worker_found_and_tells_how_far_it_is(folder: Path) -> None:
    told: list[Progress] = []
    result = Supervisor(told.append, command=pretending()).run(folder)
    assert result.verdict is not None
    assert result.verdict.reason == "from 0"
    assert all(progress.total == 20 for progress in told)


def test_a_request_stops_it_at_once_and_it_goes_on_later(supervisor: Supervisor, long: Path) -> None:
    running = Running(supervisor, long)
    begun(long)
    pid = supervisor.pid
    assert pid is not None
    supervisor.pause()
    wait_until(lambda: state(pid) == "T")
    step = job.read(long, job.PROGRESS, Progress)
    supervisor.resume()
    assert step is not None
    begun(long, step.done + 5)
    assert supervisor.pid == pid, "the same process"
    supervisor.close()
    running.join()
    assert isinstance(running.error, Stopped)


def test_a_long_pause_gives_the_memory_back_and_it_goes_on_from_the_checkpoint(long: Path) -> None:
    supervisor = Supervisor(command=pretending(), patience=0.05, retries=0)
    running = Running(supervisor, long)
    begun(long, 3)
    pid = supervisor.pid
    supervisor.pause()
    wait_until(lambda: supervisor.pid is None)
    assert pid is not None
    assert state(pid) == ""
    reached = int((long / job.CHECKPOINT).read_text())
    supervisor.resume()
    begun(long, reached + 1)
    assert supervisor.starts == 2
    supervisor.close()
    running.join()
    assert isinstance(running.error, Stopped)


def test_a_worker_that_is_killed_is_started_again_where_it_was(tmp_path: Path) -> None:
    job.prepare(tmp_path / "work", Job("", None, memory=300), b"")
    supervisor = Supervisor(command=pretending())
    running = Running(supervisor, tmp_path / "work")
    begun(tmp_path / "work", 5)
    assert supervisor.pid is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    running.join()
    assert running.result is not None
    assert running.result.verdict is not None
    assert int(running.result.verdict.reason.split()[1]) >= 5
    assert supervisor.starts == 2


def test_one_that_dies_again_and_again_is_given_up(folder: Path) -> None:
    supervisor = Supervisor(command=pretending("die"), retries=2)
    with pytest.raises(TrainingError, match="3 times without a result"):
        supervisor.run(folder)
    assert supervisor.starts == 3


def test_one_that_hangs_is_ended(folder: Path) -> None:
    supervisor = Supervisor(command=pretending("hang"), silence=0.5, retries=1)
    with pytest.raises(TrainingError, match="without a result"):
        supervisor.run(folder)
    assert supervisor.starts == 2


def test_a_paused_one_does_not_hang(long: Path) -> None:
    clock = Clock()
    supervisor = Supervisor(command=pretending("hang"), silence=900.0, patience=1e9, retries=0, clock=clock)
    running = Running(supervisor, long)
    begun(long)
    supervisor.pause()
    pid = supervisor.pid
    clock.now += 10_000.0
    clock.wait_for_looks(3)
    assert supervisor.pid == pid
    supervisor.resume()
    clock.wait_for_looks(1)
    clock.now += 1000.0
    running.join()
    assert isinstance(running.error, TrainingError), "once it runs, its silence counts"


def test_the_workers_error_is_raised_as_what_it_was(folder: Path) -> None:
    supervisor = Supervisor(command=pretending("fail"))
    with pytest.raises(BadAdapter, match="another model"):
        supervisor.run(folder)
    assert supervisor.starts == 1, "an error with a reason is not tried again"


def test_while_it_is_paused_nothing_is_started(supervisor: Supervisor, folder: Path) -> None:
    supervisor.pause()
    running = Running(supervisor, folder)
    supervisor.close()
    running.join()
    assert isinstance(running.error, Stopped)
    assert supervisor.starts == 0


def test_the_worker_dies_with_its_parent_even_while_it_is_stopped(tmp_path: Path) -> None:
    """The real worker, before it does anything."""
    code = (
        "import subprocess, sys, os, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'tests.agent.adapt.waiting_worker', {str(tmp_path)!r}, "
        "str(os.getpid())], stdout=subprocess.PIPE)\n"
        "print(child.stdout.readline().decode().strip(), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: state(pid) == "T")
        parent.kill()
        wait_until(lambda: state(pid) in ("", "Z"))
