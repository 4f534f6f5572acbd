"""Who may know whom (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "protocol": {"protocol"},
    "models": {"models", "protocol"},
    "agent": {"agent", "models", "protocol"},
    "server": {"server", "models", "protocol"},
    "tools": {"tools", "agent", "server", "models", "protocol"},
}
OURS = set(MAY_IMPORT)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & OURS


@pytest.mark.parametrize("package", sorted(OURS))
def test_packages_import_only_what_they_may(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): imported(path) - MAY_IMPORT[package] for path in files}
    assert not {path: names for path, names in wrong.items() if names}
