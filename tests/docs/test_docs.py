"""The documentation says what the code does."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import msgspec
import pytest

import tools.commands
from agent.config import AgentConfig
from protocol import errors
from protocol.config import load
from server.cloud.config import ServeConfig
from server.coordinator.config import CoordinatorConfig
from server.edge.config import EdgeConfig
from tools import docs

ROOT = docs.FOLDER.parent
PAGES = [path for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md") for path in sorted(ROOT.glob(pattern))]
HELPS = {" ".join(path): text for path, text in docs.command_helps()}


@pytest.mark.parametrize("name", docs.DOCUMENTS)
def test_generated_pages_are_fresh(name: str) -> None:
    assert (docs.FOLDER / name).read_text(encoding="utf-8") == docs.DOCUMENTS[name](), (
        f"docs/{name} is stale: run `python -m tools.docs --write`"
    )


@pytest.mark.parametrize("command", HELPS)
def test_every_command_shows_an_example(command: str) -> None:
    assert re.search(rf"Examples?:\s+{command}\s", HELPS[command] + " ")


def test_every_command_module_is_a_documented_command() -> None:
    modules = {module.name for module in pkgutil.iter_modules(tools.commands.__path__)}
    assert modules == {name.split()[1] for name in HELPS if " " in name}


@pytest.mark.parametrize(
    ("name", "schema"),
    [("agent", AgentConfig), ("serve", ServeConfig), ("edge", EdgeConfig), ("coordinator", CoordinatorConfig)],
)
def test_example_files_are_valid(name: str, schema: type[msgspec.Struct], tmp_path: Path) -> None:
    file = tmp_path / f"{name}.toml"
    file.write_text(docs.EXAMPLES[name], encoding="utf-8")
    assert load(schema, file, {}) != schema()


def test_every_error_has_its_exit_code_in_the_table() -> None:
    page = docs.exit_codes()
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.SkerryError)
    ]
    assert len(classes) > 15
    for error in classes:
        assert f"| {error.exit_code} | `{error.__name__}` | " in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(<?([^)#>\s]+)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
