"""docs/adapters.md says what the code does, and no page names a key that no file of configuration has."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from agent.adapt import gate
from agent.adapt.hardware import ARCHITECTURES, RANKS
from agent.config import Adapt, AgentConfig
from protocol.adapters import Strategy
from server.cloud.config import ServeConfig
from server.coordinator.config import CoordinatorConfig
from server.edge.adapters import robust
from server.edge.config import EdgeConfig
from tools import docs

PAGE = " ".join((docs.FOLDER / "adapters.md").read_text(encoding="utf-8").split())
WRITTEN = sorted(path for path in docs.FOLDER.glob("*.md") if path.name not in docs.DOCUMENTS)


def keys() -> dict[str, set[str]]:
    """By section; several files may have one of a name."""
    found = defaultdict[str, set[str]](set)
    for schema in (AgentConfig, ServeConfig, EdgeConfig, CoordinatorConfig):
        for section in msgspec.structs.fields(schema):
            found[section.name] |= {key.name for key in msgspec.structs.fields(section.type)}
    return found


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_keys_that_a_page_names_exist(page: Path) -> None:
    known = keys()
    named = re.findall(r"`([a-z]+)\.([a-z_]+)(?: = [^`]*)?`", page.read_text(encoding="utf-8"))
    files = {"md", "py", "db", "toml", "onnx"}
    unknown = [f"{section}.{key}" for section, key in named if section in known and key not in known[section] | files]
    assert not unknown


def test_every_strategy_has_its_row() -> None:
    table = PAGE.partition("`adapters.strategy`")[2].partition("- **")[0]
    assert re.findall(r"\| `([a-z]+)`(?: \(default\))? \|", table) == list(get_args(Strategy))


@pytest.mark.parametrize(
    "said",
    [
        f"largest of {', '.join(map(str, RANKS[:-1]))} and {RANKS[-1]}",
        f"perplexity at most {gate.WORSE:g} times",
        f"at least {gate.LEAST} and at most {gate.MOST}",
        f"p <= {gate.CHANCE:g}",
        f"{Adapt().lessons} new lessons",
        f"{Adapt().celsius:g} °C",
        f"at least {Adapt().near:g}",
        f"{Adapt().megabytes} MB and {Adapt().days} days",
        f"clipped to {robust.CLIP:g} times",
        f"at most {robust.MOST_SHARE:g} of the weights",
        f"h ({robust.CLIP:g} m",
        *(f"`{architecture}`" for architecture in ARCHITECTURES),
    ],
)
def test_numbers_are_those_of_the_code(said: str) -> None:
    assert said in PAGE
