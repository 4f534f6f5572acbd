"""Configuration of a command: the file that was named, or the user's own if there is one, and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import platformdirs

from protocol.config import load

T = TypeVar("T", bound=msgspec.Struct)
S = TypeVar("S", bound=msgspec.Struct)


def over(section: S, **values: Any) -> S:
    """The section with what the command line gives laid over it; None means not given."""
    return msgspec.structs.replace(section, **{key: value for key, value in values.items() if value is not None})


def configuration(schema: type[T], name: str, path: Path | None, env: Mapping[str, str]) -> T:
    """`path`, else `<name>.toml` in the user's configuration folder if it exists, else defaults. Raises ConfigError."""
    if path is None:
        usual = platformdirs.user_config_path("skerry") / f"{name}.toml"
        path = usual if usual.exists() else None
    return load(schema, path, env)
