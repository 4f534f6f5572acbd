"""Configuration: one TOML file per process, every key also an environment variable.

A configuration is a msgspec struct whose fields are sections, themselves structs. `load` reads the file, lays
`SKERRY_<SECTION>_<KEY>` over it, and checks the result against the struct's types and bounds.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from protocol.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


class Key(msgspec.Struct, frozen=True):
    """One configuration key, as the documentation's table shows it."""

    section: str
    name: str
    default: Any
    allowed: str
    description: str

    @property
    def env(self) -> str:
        return f"SKERRY_{self.section}_{self.name}".upper()


def keys(schema: type[msgspec.Struct]) -> Iterator[Key]:
    """All keys of a configuration, in order. Descriptions stand in the fields' `msgspec.Meta`."""
    for section, struct in get_type_hints(schema, include_extras=True).items():
        for field in msgspec.structs.fields(struct):
            info = msgspec.inspect.type_info(field.type)
            description = ""
            if isinstance(info, msgspec.inspect.Metadata):
                description = (info.extra_json_schema or {}).get("description", "")
                info = info.type
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            yield Key(section, field.name, default, _allowed(info), description)


def load(schema: type[T], path: Path | None, env: Mapping[str, str]) -> T:
    """Reads `path` (None: defaults only), lays `env` over it and validates.

    Raises ConfigError, which names the file (or variable), the key and what is allowed.
    """
    values: dict[str, dict[str, Any]] = _read(path) if path else {}
    known = {(key.section, key.name): key for key in keys(schema)}
    sections = {key.section for key in known.values()}
    for section, entries in values.items():
        if section not in sections or not isinstance(entries, dict):
            raise ConfigError(f"{path}: unknown section [{section}]; allowed: {', '.join(sorted(sections))}")
        for name in entries:
            if (section, name) not in known:
                allowed = ", ".join(key.name for key in known.values() if key.section == section)
                raise ConfigError(f"{path}: unknown key {section}.{name}; allowed in [{section}]: {allowed}")
    _check_variables(known.values(), sections, env)
    struct_types = get_type_hints(schema)
    built: dict[str, Any] = {section: struct_types[section]() for section in struct_types}
    for key in known.values():
        if key.env in env:
            value: Any = env[key.env]
            origin = f"environment variable {key.env}"
        elif key.name in values.get(key.section, {}):
            value = values[key.section][key.name]
            origin = f"{path}"
        else:
            continue
        # A variable is text, so it may be read as the number or list that it spells; a TOML value may not.
        checked = _check(struct_types[key.section], key, value, origin, strict=key.env not in env)
        built[key.section] = msgspec.structs.replace(built[key.section], **{key.name: checked})
    return schema(**built)


def _check_variables(known: Iterable[Key], sections: set[str], env: Mapping[str, str]) -> None:
    """A misspelt variable would be ignored in silence."""
    names = {key.env for key in known}
    for name in env:
        section = next((s for s in sections if name.startswith(f"SKERRY_{s.upper()}_")), None)
        if section and name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            allowed = ", ".join(sorted(n for n in names if n.startswith(f"SKERRY_{section.upper()}_")))
            raise ConfigError(f"environment variable {name}: no such key; {hint}allowed in [{section}]: {allowed}")


def _check(struct: type[msgspec.Struct], key: Key, value: Any, origin: str, *, strict: bool) -> Any:
    if not strict and isinstance(key.default, list | tuple):
        value = [part.strip() for part in value.split(",") if part.strip()]
    hint = get_type_hints(struct, include_extras=True)[key.name]
    try:
        return msgspec.convert(value, hint, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{origin}: key {key.section}.{key.name} = {value!r} is not allowed ({error}); allowed: {key.allowed}"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _allowed(info: msgspec.inspect.Type) -> str:
    match info:
        case msgspec.inspect.LiteralType():
            return ", ".join(str(value) for value in info.values)
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            word = "integer" if isinstance(info, msgspec.inspect.IntType) else "number"
            low = info.ge if info.ge is not None else info.gt
            high = info.le if info.le is not None else info.lt
            if low is not None and high is not None:
                return f"{word} {low} to {high}"
            if low is not None:
                return f"{word} from {low}"
            return word
        case msgspec.inspect.UnionType():
            return " or ".join(map(_allowed, info.types))
        case msgspec.inspect.Metadata():
            return _allowed(info.type)
        case msgspec.inspect.BoolType():
            return "true, false"
        case msgspec.inspect.ListType():
            return f"list of {_allowed(info.item_type)}"
        case msgspec.inspect.StrType():
            return _allowed_text(info.pattern or "")
        case _:
            return type(info).__name__.removesuffix("Type").lower()


def _allowed_text(pattern: str) -> str:
    for scheme in ("http", "mqtt"):
        if scheme in pattern:
            return f"a URL, {scheme}(s)://host:port"
    return "letters, digits, _ . - (64 at most)" if "{1,64}" in pattern else "text"
