"""`skerry adapt run`, `status`, `list`, `use` and `rollback`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.adapt.job import Progress
from agent.adapt.lessons import Lessons
from agent.adapt.session import LOCK
from agent.adapt.store import AdapterStore
from models.adapter import Adapter, Factors, write
from models.engine.gguf import GgufTokenizer
from models.fingerprint import fingerprint
from protocol.errors import BadAdapter, NoTraining, StoreError, StoreInUse, TrainingError
from protocol.folder_lock import FolderLock
from tests.agent.adapt.adapters import small_file
from tests.agent.adapt.small_model import small_model
from tests.agent.adapt.taught import lessons
from tools.cli import skerry
from tools.commands.adapt.run import shown


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(smollm2, tmp_path_factory.mktemp("models") / "narrow.gguf")


@pytest.fixture
def folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKERRY_DEVICE_FOLDER", str(tmp_path))
    monkeypatch.setenv("SKERRY_MODEL_NAME", str(model))
    monkeypatch.setenv("SKERRY_ADAPT_THREADS", "1")
    monkeypatch.setenv("SKERRY_ADAPT_RANK", "2")
    return tmp_path


@pytest.fixture
def taught(folder: Path, model: Path) -> Path:
    """A device with lessons."""
    kept = Lessons(folder / "lessons", fingerprint(model))
    kept.add_all(lessons(GgufTokenizer.open(model), 80))
    kept.close()
    return folder


def adapter_file(folder: Path, model: Path, seed: int) -> Path:
    """For the small model."""
    import numpy as np

    random = np.random.default_rng(seed)
    a, b = (random.standard_normal(shape).astype(np.float32) * 0.01 for shape in ((2, 64), (64, 2)))
    path = folder / f"made-{seed}.gguf"
    write(Adapter(fingerprint(model), "llama", 4.0, {"blk.1.attn_q": Factors(a, b)}), path)
    return path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(skerry, ["adapt", *arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


def test_a_training_in_the_foreground_ends_in_the_list(taught: Path, model: Path) -> None:
    result = run("run", "--now", "--json")
    (outcome,) = json.loads(result.stdout)
    assert outcome["slot"] == "own"
    assert outcome["adapter"]["rank"] == 2
    assert "training" in result.stderr
    assert "judging" in result.stderr
    (row,) = json.loads(run("list", "--json").stdout)
    assert row["id"] == outcome["adapter"]["id"]
    assert row["slots"] == (["own"] if outcome["in_use"] else [])
    assert row["verdict"]["judged"] >= 8
    assert f"v1   {row['id'][:12]}" in run("list").output
    status = json.loads(run("status", "--json").stdout)
    assert (status["new"], status["process"]) == (0, None)
    with pytest.raises(TrainingError, match="--now"):
        run("run")


def test_run_needs_lessons_torch_and_nobody_else_who_trains(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FolderLock(taught / "adapters", LOCK, "the training", "device.folder")
    with pytest.raises(StoreInUse, match="another process is training"):
        run("run", "--now")
    assert json.loads(run("status", "--json").stdout)["process"] is not None
    lock.close()
    monkeypatch.setattr("agent.adapt.session.installed", lambda: False)
    with pytest.raises(NoTraining, match=r"pip install 'skerry\[train\]'"):
        run("run", "--now")


def test_run_without_lessons_says_how_to_get_some(folder: Path) -> None:
    with pytest.raises(TrainingError, match="skerry adapt add"):
        run("run", "--now")


def test_use_takes_files_ids_and_versions_and_rollback_goes_back(folder: Path, model: Path) -> None:
    first, second = (adapter_file(folder, model, seed) for seed in (1, 2))
    used = json.loads(run("use", str(first), "--json").stdout)
    assert "is used in slot own" in run("use", str(second)).output
    store = AdapterStore(folder / "adapters", fingerprint(model))
    assert store.state().slots["own"] == store.find("v2").id
    run("use", "v1")
    assert store.state().slots["own"] == used["id"]
    run("use", used["id"][:8], "--slot", "fleet.0")
    assert set(store.state().slots) == {"own", "fleet.0"}
    run("rollback")
    assert set(store.state().slots) == {"own"}
    assert json.loads(run("rollback", "--json").stdout)["slots"]["own"] == store.find("v2").id
    assert "no adapter is used" in run("use", "none").output
    assert store.state().slots == {}
    assert all(kept.private for kept in store.adapters()), "what it was trained on is not known"
    shown_list = run("list").output
    assert "kept" in shown_list
    assert "private" in shown_list


def test_use_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadAdapter):
        run("use", str(small_file(tmp_path, 1)))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadAdapter):
        run("use", str(tmp_path / "broken.gguf"))
    with pytest.raises(StoreError, match="no adapter"):
        run("use", "v7")
    with pytest.raises(StoreError, match="nothing to go back to"):
        run("rollback")


def test_status_of_a_device_that_never_learned(folder: Path) -> None:
    told = json.loads(run("status", "--json").stdout)
    assert (told["doing"], told["lessons"], told["in_use"]) == ("off", 0, {})
    assert "the bare model" in run("status").output
    assert "none yet" in run("list").output


def test_progress_in_words() -> None:
    assert shown(Progress("train", 3, 10, 1.25, 65.0)) == "training 3 of 10, loss 1.250, 1:05 left"
    assert shown(Progress("load")) == "loading the model"


def test_a_model_in_onnx_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.onnx").write_bytes(b"\x08\x09")
    (tmp_path / "examples.jsonl").write_text('{"prompt": "one", "answer": "two"}\n')
    monkeypatch.setenv("SKERRY_DEVICE_FOLDER", str(tmp_path / "device"))
    monkeypatch.setenv("SKERRY_MODEL_NAME", str(model))
    assert "off: models in ONNX take no adapters" in run("status").output
    assert json.loads(run("status", "--json").stdout)["takes_adapters"] is False
    assert "none: models in ONNX take no adapters" in run("list").output
    for command in (["run", "--now"], ["add", str(tmp_path / "examples.jsonl")], ["use", "v1"]):
        with pytest.raises(TrainingError, match=r"name a GGUF file in model\.name"):
            run(*command)
