"""A user's own catalog entries: one file each where we write them, any `*.toml` where they do."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from models.catalog import Catalog, Entry, Listed, check_paths
from models.partial import disk_errors
from protocol.errors import ConfigError

_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*models[ \t]*\]\]", re.MULTILINE)


def add_entry(entry: Entry, folder: Path) -> Path:
    """Writes the entry to `<folder>/<id>.toml`; a shipped id is overridden by it.

    Raises ConfigError (an entry of the user's with this id exists, or it clashes with another's file),
    UnsafePath, ReadOnlyFolder.
    """
    check_paths(entry, "new entry")
    catalog = Catalog(folder)
    catalog.check(Listed(entry, path := folder / f"{entry.id}.toml"))
    if path.exists() or (entry.id in catalog and not catalog.find(entry.id).shipped):
        origin = path if path.exists() else catalog.find(entry.id).origin
        raise ConfigError(f"{origin} holds an entry {entry.id!r} already; `skerry models rm {entry.id}` removes it")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, entry_toml(entry))
    return path


def remove_entry(listed: Listed) -> None:
    """Takes a user's entry out of its file, which goes too if nothing else stands there.

    Raises ConfigError if the file is written in a way that leaves no safe cut, ReadOnlyFolder.
    """
    path, model = listed.origin, listed.entry.id
    text = path.read_text(encoding="utf-8")
    before = tomllib.loads(text)["models"]
    position = [raw["id"] for raw in before].index(model)
    # A cut in the text keeps the user's comments; parsing what is left proves that it was the right cut.
    starts = [match.start() for match in _HEADER.finditer(text)] + [len(text)]
    rest = text[: starts[position]] + text[starts[position + 1] :] if len(starts) == len(before) + 1 else text
    if _models(rest) != before[:position] + before[position + 1 :]:
        raise ConfigError(f"{path}: entry {model!r} can't be cut out safely; remove it with an editor")
    with disk_errors(path):
        if len(before) == 1:
            path.unlink()
        else:
            _replace(path, rest)


def entry_toml(entry: Entry) -> str:
    fields: dict[str, Any] = msgspec.to_builtins(entry)
    tables = {name: fields.pop(name, []) for name in ("files", "sources")}
    lines = ["[[models]]", *_pairs(fields)]
    for name, rows in tables.items():
        for row in rows:
            lines += ["", f"[[models.{name}]]", *_pairs(row)]
    return "\n".join(lines) + "\n"


def _pairs(table: dict[str, Any]) -> list[str]:
    # JSON's strings, integers and lists of strings are also TOML's; only DEL must be escaped in TOML.
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f") for key, value in table.items()
    ]


def _models(text: str) -> list[Any]:
    try:
        return list(tomllib.loads(text).get("models", []))
    except tomllib.TOMLDecodeError:
        return [None]


def _replace(path: Path, text: str) -> None:
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(text, encoding="utf-8")
    written.replace(path)
