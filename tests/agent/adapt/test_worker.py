"""Training for real: a process, torch, llama.cpp and a small model; and what goes wrong with each."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.adapt import job, lesson
from agent.adapt.hardware import RANKS
from agent.adapt.job import Job, Progress, Result, Trained
from agent.adapt.lesson import Lesson, Target
from agent.adapt.recipe import Recipe
from agent.adapt.supervise import Supervisor
from models.adapter import read
from models.engine.gguf import GgufTokenizer
from protocol.errors import BadAdapter, BadModelFile, SkerryError, TrainingError
from tests.agent.adapt.adapters import small_file
from tests.agent.adapt.taught import lessons
from tests.brokers import ROOT
from tests.protocol.transport.worlds import wait_until

RECIPE = Recipe(modules=("attn_q", "attn_v"), batch=8, epochs=1.0, rate=0.01, bfloat16=False)
LONG = msgspec.structs.replace(RECIPE, epochs=40.0, rate=0.0005)


@pytest.fixture
def given(narrow: Path) -> Job:
    return Job(str(narrow), RECIPE, rank=4, threads=1)


@pytest.fixture(scope="session")
def taught(narrow_tokenizer: GgufTokenizer) -> list[Lesson]:
    return lessons(narrow_tokenizer, 80)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def trained(work: Path, given: Job, taught: list[Lesson], supervisor: Supervisor | None = None) -> Result:
    job.prepare(work, given, lesson.encode(taught))
    return (supervisor or Supervisor(retries=0)).run(work)


def other(given: Job, **changes: object) -> Job:
    return msgspec.structs.replace(given, **changes)


def test_from_lessons_to_an_adapter_that_the_gate_lets_through(
    work: Path, given: Job, taught: list[Lesson], narrow_id: str
) -> None:
    told: list[Progress] = []
    result = trained(work, given, taught, Supervisor(told.append, retries=0))
    assert result.verdict is not None
    assert result.verdict.passed, result.verdict.reason
    assert result.verdict.judged >= 8
    assert result.trained is not None
    assert (result.trained.rank, result.trained.lessons) == (4, len(taught) - result.verdict.judged)
    assert result.trained.rss > 100e6
    assert result.trained.examples_per_s > 0
    adapter = read(work / job.CANDIDATE)
    assert (adapter.model, adapter.rank) == (narrow_id, 4)
    assert adapter.alpha == RECIPE.alpha, "whatever the rank"
    assert adapter.centroid is not None
    assert {progress.stage for progress in told} >= {"judge"}


def test_killed_in_mid_training_it_ends_with_the_same_adapter(work: Path, given: Job, taught: list[Lesson]) -> None:
    given = other(given, recipe=LONG)
    whole = trained(work, given, taught)
    assert whole.trained is not None
    job.prepare(work, given, lesson.encode(taught))
    supervisor = Supervisor()
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(supervisor.run(work)))
    thread.start()
    wait_until((work / job.CHECKPOINT).exists)
    pid = supervisor.pid
    assert pid is not None
    assert not (work / job.TRAINED).exists()
    os.kill(pid, signal.SIGKILL)
    thread.join(120)
    assert supervisor.starts == 2
    (result,) = results
    assert result.trained is not None
    assert result.trained.id == whole.trained.id


def test_killed_before_the_gate_it_is_judged_without_training_again(
    work: Path, given: Job, taught: list[Lesson]
) -> None:
    first = trained(work, given, taught)
    (work / job.LESSONS).write_bytes(lesson.encode(taught))
    (work / job.CHECKPOINT).unlink()
    again = Supervisor(retries=0).run(work)
    assert again.verdict == first.verdict
    assert again.trained == first.trained


def test_the_next_training_starts_from_the_last_and_has_to_beat_it(
    work: Path, given: Job, taught: list[Lesson], tmp_path: Path
) -> None:
    trained(work, given, taught)
    present = tmp_path / "present.gguf"
    (work / job.CANDIDATE).rename(present)
    weak = msgspec.structs.replace(RECIPE, rate=1e-7)
    result = trained(work, other(given, start=str(present), recipe=weak), taught)
    assert result.verdict is not None
    assert result.verdict.present is not None
    assert result.verdict.candidate is not None
    assert result.verdict.bare is not None
    assert result.verdict.present.loss == pytest.approx(result.verdict.candidate.loss, abs=0.05)
    assert result.verdict.bare.loss != pytest.approx(result.verdict.candidate.loss, abs=0.5)


def test_it_may_not_take_more_memory_than_it_was_given(work: Path, given: Job, taught: list[Lesson]) -> None:
    with pytest.raises(TrainingError, match=r"MB that it may: set adapt\.rank lower"):
        trained(work, other(given, memory=60_000_000), taught)
    assert not (work / job.CANDIDATE).exists()


def test_without_a_rank_it_takes_the_largest_that_fits_and_measures_once(
    work: Path, given: Job, taught: list[Lesson]
) -> None:
    result = trained(work, other(given, rank=0, memory=10**10), taught)
    assert result.trained is not None
    assert result.trained.rank == max(RANKS)
    table = work.parent / "latency.json"
    before = table.read_bytes()
    result = trained(work, other(given, rank=0, memory=10**10, step_s=1000.0), taught)
    assert table.read_bytes() == before
    with pytest.raises(TrainingError, match=r"raise adapt\.memory_mb or adapt\.step_s"):
        trained(work, other(given, rank=0, memory=10**10, step_s=1e-6), taught)


def no_lessons(work: Path) -> None:
    (work / job.LESSONS).write_bytes(lesson.encode([]))


def damaged_lessons(work: Path) -> None:
    (work / job.LESSONS).write_bytes(b"\xc1" + (work / job.LESSONS).read_bytes()[:100])


def no_job(work: Path) -> None:
    (work / job.JOB).write_bytes(b"{")


@pytest.mark.parametrize("damage", [no_lessons, damaged_lessons, no_job])
def test_bad_input_is_one_clear_error(
    damage: Callable[[Path], None], work: Path, given: Job, taught: list[Lesson]
) -> None:
    job.prepare(work, given, lesson.encode(taught))
    damage(work)
    command = [sys.executable, "-m", "agent.adapt.worker", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == TrainingError.exit_code
    assert "Traceback" not in done.stderr
    result = job.read(work, job.RESULT, Result)
    assert result is not None
    assert (result.kind, result.verdict) == ("TrainingError", None)
    assert result.error


def test_lessons_of_another_vocabulary_are_an_error(work: Path, given: Job) -> None:
    strange = [Lesson([900_000 + n, 1, 2], [Target(1, "label", [1])], "example") for n in range(60)]
    with pytest.raises(TrainingError):
        trained(work, given, strange)


def test_a_training_that_diverges_puts_nothing_into_use(work: Path, given: Job, taught: list[Lesson]) -> None:
    wild = msgspec.structs.replace(RECIPE, rate=1.0, epochs=6.0)
    passed = False
    with contextlib.suppress(TrainingError, BadAdapter):  # the loss, or what came of it, is not finite
        verdict = trained(work, other(given, recipe=wild), taught).verdict
        passed = verdict is None or verdict.passed
    assert not passed


def test_a_model_that_is_gone_is_an_error(work: Path, given: Job, taught: list[Lesson], tmp_path: Path) -> None:
    with pytest.raises(BadModelFile):
        trained(work, other(given, model=str(tmp_path / "none.gguf")), taught)


def test_an_adapter_from_elsewhere_is_judged_alone(
    work: Path, given: Job, taught: list[Lesson], tmp_path: Path
) -> None:
    trained(work, given, taught)
    good = tmp_path / "good.gguf"
    (work / job.CANDIDATE).rename(good)
    job.prepare(work, other(given, recipe=None), lesson.encode([]), good)
    result = Supervisor(retries=0).run(work)
    assert result.verdict is not None
    assert result.verdict.passed, result.verdict.reason
    assert result.trained is None
    job.prepare(work, other(given, recipe=None), lesson.encode([]), small_file(tmp_path, 1))
    with pytest.raises(BadAdapter, match="another model"):
        Supervisor(retries=0).run(work)


def test_a_full_disk_is_an_error_that_says_so(work: Path, given: Job, taught: list[Lesson]) -> None:
    """The worker may write files of some bytes only, as if there were no more room."""
    job.prepare(work, given, lesson.encode(taught))
    supervisor = Supervisor(retries=0, command=lambda folder: [*_LIMITED, str(folder), str(os.getpid())])
    with pytest.raises(SkerryError, match=r"free some space|make room"):
        supervisor.run(work)
    assert job.read(work, job.TRAINED, Trained) is None


_LIMITED = [
    sys.executable,
    "-c",
    "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    "os.execv(sys.executable, [sys.executable, '-m', 'agent.adapt.worker', *sys.argv[1:]])",
]
