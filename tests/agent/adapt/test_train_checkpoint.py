"""Training that is cut off goes on, and what it cannot go on from never harms it (agent/adapt/checkpoint.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from agent.adapt.checkpoint import Checkpoint
from agent.adapt.recipe import Progress
from agent.adapt.torch_model import Base
from agent.adapt.train import train
from models.adapter import Adapter
from protocol.errors import TrainingError
from tests.agent.adapt.training_process import RECIPE, lessons
from tests.models.tiny import Tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny("llama").write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def base(file: Path) -> Base:
    return Base.load(file, 1, bfloat16=False)


@pytest.fixture(scope="module")
def uninterrupted(base: Base) -> Adapter:
    return train(base, lessons(), RECIPE)


def same(one: Adapter, other: Adapter) -> bool:
    return one.factors.keys() == other.factors.keys() and all(
        np.array_equal(getattr(f, half), getattr(other.factors[name], half))
        for name, f in one.factors.items()
        for half in "ab"
    )


def process(file: Path, folder: Path, stop: int, megabytes: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.agent.adapt.training_process", str(file), str(folder)]
    return subprocess.Popen(
        [*command, str(stop), str(megabytes)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    file: Path, tmp_path: Path, uninterrupted: Adapter
) -> None:
    with process(file, tmp_path, stop=5) as killed:
        assert killed.stdout is not None
        assert any(line == "training 5\n" for line in killed.stdout)
        killed.kill()
    with process(file, tmp_path, stop=0) as resumed:
        assert resumed.stdout is not None
        first = next(line for line in resumed.stdout if line.startswith("training"))
        resumed.communicate()
    assert resumed.returncode == 0
    assert first == "training 5\n"  # it was written down after step 4
    made = np.load(tmp_path / "factors.npz", allow_pickle=False)
    assert len(made.files) == 2 * len(uninterrupted.factors)
    for name, factors in uninterrupted.factors.items():
        assert np.array_equal(made[f"{name}.a"], factors.a)
        assert np.array_equal(made[f"{name}.b"], factors.b)


def test_one_that_is_whole_has_nothing_left_to_do(base: Base, tmp_path: Path, uninterrupted: Adapter) -> None:
    checkpoint, told = Checkpoint(tmp_path / "checkpoint"), list[Progress]()
    train(base, lessons(), RECIPE, None, checkpoint)
    again = train(base, lessons(), RECIPE, None, checkpoint, told.append)
    assert same(again, uninterrupted)
    assert not [progress for progress in told if progress.stage == "training"]


@pytest.mark.parametrize("what", ["lessons", "recipe", "start"])
def test_one_of_another_run_is_not_used(base: Base, tmp_path: Path, uninterrupted: Adapter, what: str) -> None:
    checkpoint, told = Checkpoint(tmp_path / "checkpoint"), list[Progress]()
    train(base, lessons(), RECIPE, None, checkpoint)
    train(
        base,
        lessons()[1:] if what == "lessons" else lessons(),
        msgspec.structs.replace(RECIPE, rate=1e-4) if what == "recipe" else RECIPE,
        uninterrupted if what == "start" else None,
        checkpoint,
        told.append,
    )
    assert next(progress for progress in told if progress.stage == "training").step == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_one_is_as_none(base: Base, tmp_path: Path, uninterrupted: Adapter, damage: str) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    train(base, lessons(), RECIPE, None, checkpoint)
    raw = bytearray(checkpoint.path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    damaged = {"truncated": raw[: len(raw) // 2], "flipped": raw, "empty": b"", "text": b"no archive"}[damage]
    checkpoint.path.write_bytes(damaged)
    assert same(train(base, lessons(), RECIPE, None, checkpoint), uninterrupted)


def test_where_none_can_be_written_it_says_so(base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        train(base, lessons(), RECIPE, None, Checkpoint(tmp_path / "file" / "checkpoint", every=1))


def test_without_memory_it_says_so(file: Path, tmp_path: Path) -> None:
    with process(file, tmp_path, stop=0, megabytes=60) as starved:
        said = starved.communicate()[1]
    assert starved.returncode == 1
    assert "TrainingError: there is not enough memory to train" in said
