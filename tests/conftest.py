"""What all tests share: the real models, pulled once."""

from __future__ import annotations

import os
from pathlib import Path

import llama_cpp.llama_cpp as llama
import pytest

from models.catalog import Catalog
from models.pull import pull
from models.store import Places


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


def _pulled(id: str) -> Path:
    places = Places.of(os.environ)
    return pull(Catalog(places.entries).find(id).entry, places.models, env=os.environ).path
