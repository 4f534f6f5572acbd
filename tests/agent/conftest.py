"""What the agent's tests share. `engine` is each module's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.link.identity import Identity, identity
from agent.memory.keeper import Keeper
from agent.memory.memory import EntryMemory
from models.engine.base import Engine
from tests.agent.chains import keeper_of


@pytest.fixture(scope="module")
def prompt(engine: Engine) -> list[int]:
    return engine.tokenizer.encode("The three largest cities of Italy are", start=True)


@pytest.fixture(scope="module")
def word(engine: Engine) -> int:
    """A token that the model does not write by itself in these tests."""
    return engine.tokenizer.encode(" banana")[0]


@pytest.fixture
def me(tmp_path: Path) -> Identity:
    return identity(tmp_path / "me.key")


@pytest.fixture
def other(tmp_path: Path) -> Identity:
    return identity(tmp_path / "other.key")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[EntryMemory]:
    with EntryMemory(tmp_path / "memory") as memory:
        yield memory


@pytest.fixture
def keeper(memory: EntryMemory, me: Identity, tmp_path: Path) -> Keeper:
    return keeper_of(memory, me, tmp_path, audits=0.0)
