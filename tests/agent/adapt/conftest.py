"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.engine.gguf import GgufTokenizer
from models.fingerprint import fingerprint
from tests.agent.adapt.small_model import small_model


@pytest.fixture(scope="session")
def narrow(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that trains in a second."""
    return small_model(smollm2, tmp_path_factory.mktemp("narrow") / "narrow.gguf")


@pytest.fixture(scope="session")
def narrow_id(narrow: Path) -> str:
    return fingerprint(narrow)


@pytest.fixture(scope="session")
def narrow_tokenizer(narrow: Path) -> GgufTokenizer:
    return GgufTokenizer.open(narrow)
