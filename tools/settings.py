"""Configuration of a command: the file that was named, or the user's own if there is one, and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import platformdirs

from protocol.config import load

T = TypeVar("T", bound=msgspec.Struct)


def configuration(schema: type[T], name: str, path: Path | None, env: Mapping[str, str]) -> T:
    """`path`, else `<name>.toml` in the user's configuration folder if it exists, else defaults. Raises ConfigError."""
    if path is None:
        usual = platformdirs.user_config_path("skerry") / f"{name}.toml"
        path = usual if usual.exists() else None
    return load(schema, path, env)
