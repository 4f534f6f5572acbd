"""What all tests share: the real models, pulled or made once."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import llama_cpp.llama_cpp as llama
import platformdirs
import pytest

from models.catalog import Catalog
from models.fingerprint import fingerprint, sidecar
from models.pull import pull
from models.store import Places
from models.workshop.export import Exporter, export
from models.workshop.job import Job
from models.workshop.quantize import quantize

MADE = platformdirs.user_cache_path("skerry") / "tests"
WORKSHOP = Path(__file__).parents[1] / "models" / "workshop"
ONLY_LOOK = {"compare", "inspect", "measure", "measure_model", "perplexity", "speed"}  # modules that make no model


@pytest.fixture(scope="session", autouse=True)
def own_device_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that tests start may use, or wait for, what the user's own device has learned."""
    os.environ["SKERRY_DEVICE_FOLDER"] = str(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct, from the models' folder (SKERRY_MODELS) or pulled into it."""
    return _pulled("smollm2-135m")


@pytest.fixture(scope="session")
def qwen() -> Path:
    """The same for Qwen2.5-Coder-0.5B-Instruct."""
    return _pulled("qwen2.5-coder-0.5b")


@pytest.fixture(scope="session")
def smollm2_q2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with fewer bits per weight: the same tokenizer and another distribution."""
    path = tmp_path_factory.mktemp("models") / "smollm2-q2.gguf"
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_MOSTLY_Q2_K
    params.allow_requantize = True
    params.nthread = 1
    assert llama.llama_model_quantize(str(smollm2).encode(), str(path).encode(), params) == 0
    return path


@pytest.fixture(scope="session")
def smollm2_onnx(smollm2: Path) -> Path:
    """SmolLM2 for onnxruntime, in float32: the GGUF file's weights, and its tokenizer."""
    return _exported(smollm2, "genai")


@pytest.fixture(scope="session")
def smollm2_optimum(smollm2: Path) -> Path:
    """The same by the other exporter, with the other layout of the cache."""
    return _exported(smollm2, "optimum")


@pytest.fixture(scope="session")
def smollm2_int4(smollm2_onnx: Path) -> Path:
    """SmolLM2 for onnxruntime in 4 bits. What it says of a prompt depends on how many tokens it reads at once."""

    def make(out: Path) -> None:
        quantize(smollm2_onnx, out, "int4", Job(os.environ))

    return _made("smollm2-int4", smollm2_onnx, lambda module: module not in ONLY_LOOK, make)


@pytest.fixture(scope="module", params=["smollm2", "smollm2_onnx"])
def slm(request: pytest.FixtureRequest) -> Path:
    """SmolLM2 for each engine; what is fed together and what one by one comes to the same."""
    path: Path = request.getfixturevalue(request.param)
    return path


def _exported(source: Path, exporter: Exporter) -> Path:
    def takes_part(module: str) -> bool:
        return module not in ONLY_LOOK and "quantize" not in module

    return _made(f"smollm2-{exporter}", source, takes_part, lambda out: export(source, out, exporter, Job(os.environ)))


def _made(name: str, source: Path, takes_part: Callable[[str], bool], make: Callable[[Path], object]) -> Path:
    """What `make` writes to a path, kept between runs for as long as neither the source changes nor any module of the
    workshop that takes part."""
    modules = [path for path in sorted(WORKSHOP.glob("*.py")) if takes_part(path.stem)]
    parts = [fingerprint(source), *(path.read_text() for path in modules)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = MADE / f"{name}-{key}"
    if not target.exists():
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        make(fresh)
        try:
            fresh.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
        for old in sorted(MADE.glob(f"{name}-{'?' * 16}"), key=lambda path: path.stat().st_mtime)[:-2]:
            shutil.rmtree(old, ignore_errors=True)
            sidecar(old).unlink(missing_ok=True)
    return target


def _pulled(id: str) -> Path:
    places = Places.of(os.environ)
    return pull(Catalog(places.entries).find(id).entry, places.models, env=os.environ).path
