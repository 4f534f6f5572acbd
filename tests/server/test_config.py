"""The configuration of `skerry serve`, and what it opens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from protocol.config import keys, load
from protocol.errors import ConfigError
from server.cloud.backends import open_upstream
from server.cloud.config import Limits, ServeConfig, UpstreamSection


def test_every_key_is_described_and_has_a_sound_default() -> None:
    listed = list(keys(ServeConfig))
    assert all(key.description.endswith(".") for key in listed)
    assert len({(key.section, key.name) for key in listed}) == len(listed) > 20
    env = {key.env: str(key.default) for key in listed}
    assert load(ServeConfig, None, env) == ServeConfig()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[listen]\nport = 70000", "listen.port"),
        ('[upstream]\nkind = "magic"', "embedded, openai"),
        ("[limits]\nsessions = 0", "limits.sessions"),
        ("[limits]\nseats = 1", "limits.seats"),
        ("[upsteam]\n", "upstream"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as caught:
        load(ServeConfig, path, {})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        ServeConfig(limits=Limits(sessions=300)),
        ServeConfig(upstream=UpstreamSection(kind="openai")),
        ServeConfig(upstream=UpstreamSection(kind="openai", url="localhost:8080")),
        ServeConfig(upstream=UpstreamSection(kind="openai", url="http://x/v1", endpoint="chat", tokenizer="y.gguf")),
    ],
)
def test_what_cannot_work_together_is_refused(config: ServeConfig) -> None:
    def resolve(name: str) -> Any:
        raise AssertionError("no model is looked for")

    with pytest.raises(ConfigError):
        asyncio.run(open_upstream(config, resolve))
