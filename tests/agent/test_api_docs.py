"""docs/http.md and docs/metrics.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import Mock

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.api.app import Api, ModelName
from agent.config import Api as ApiConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def api() -> Api:
    agent = Mock()
    agent.scheduler.active = agent.scheduler.queued = agent.engine.threads = 0
    return Api(agent, None, ApiConfig(), ModelName("model", frozenset()))


def rows(file: str, columns: int) -> list[tuple[str, ...]]:
    """The cells of the document's first table, without code marks."""
    table = re.search(r"^\|---.*\n((?:\|.*\n)+)", (DOCS / file).read_text(), re.MULTILINE)
    assert table
    cells = [line.strip("|\n ").split(" | ") for line in table[1].splitlines()]
    return [tuple(cell.strip("` ") for cell in row[:columns]) for row in cells]


def test_every_endpoint_is_documented(api: Api) -> None:
    served = [(route.method, route.resource.canonical) for route in api.app.router.routes() if route.resource]
    assert rows("http.md", 2) == [(method, path) for method, path in served if method != "HEAD"]


def test_every_metric_is_documented(api: Api) -> None:
    exposed = [
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type, family.documentation)
        for family in text_string_to_metric_families(api.metrics.text().decode())
        if not family.name.endswith("_created")
    ]
    assert [tuple(cell.replace("`", "") for cell in row) for row in rows("metrics.md", 3)] == exposed
