"""Texts with labels, out of a CSV file of the user's own (RFC 4180) with columns `label` and `text`."""

from __future__ import annotations

import csv
import io
import random
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from protocol.errors import ConfigError

CHARACTERS = 300  # of a text that is classified the models see the first ones
MOST_LABELS = 256  # the models are told them all
_COLUMNS = ("label", "text")


@dataclass(frozen=True, slots=True)
class Item:
    text: str
    label: int  # index


@dataclass(frozen=True, slots=True)
class Dataset:
    """Items, of which the models see something different each, and what their labels are called, sorted."""

    labels: tuple[str, ...]
    items: tuple[Item, ...]

    def drawn(self, count: int, seed: int) -> Dataset:
        """`count` of the items, or all, in an order of the seed."""
        items = list(self.items)
        random.Random(seed).shuffle(items)
        return replace(self, items=tuple(items[:count]))


def visible(text: str) -> str:
    return " ".join(text[:CHARACTERS].split())


def distinct(items: Iterable[Item]) -> tuple[Item, ...]:
    """Without those that look like an earlier one to the models, whatever their labels are."""
    found: dict[str, Item] = {}
    for item in items:
        found.setdefault(visible(item.text), item)
    return tuple(found.values())


def read(path: Path) -> Dataset:
    """Raises ConfigError, which names the line."""
    rows = list(_rows(path))
    labels = tuple(sorted({label for label, _ in rows}))
    if len(labels) < 2:
        count = "one label" if labels else "no rows"
        raise ConfigError(f"{path}: {count}, and at least two different labels are needed")
    if len(labels) > MOST_LABELS:
        raise ConfigError(f"{path}: {len(labels)} different labels, and {MOST_LABELS} is the most; merge the rare ones")
    index = {label: at for at, label in enumerate(labels)}
    return Dataset(labels, distinct(Item(text, index[label]) for label, text in rows))


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(label, text), without blank lines. White space counts as one space."""
    reader = csv.reader(io.StringIO(_content(path), newline=""), strict=True)
    columns: list[str] = []
    line = 1
    try:
        for row in reader:
            blank = not any(map(str.strip, row))
            if not blank and not columns:
                columns = _header(path, line, row)
            elif not blank:
                yield _fields(path, line, row, columns)
            line = reader.line_num + 1
    except csv.Error as error:
        _refuse(path, line, f"no CSV from here on: {error}; is a double quote missing?")
    if not columns:
        raise ConfigError(f"{path}: empty; the first line names the columns label and text")


def _content(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _refuse(path, line, "not UTF-8; save the file as UTF-8")


def _header(path: Path, line: int, row: list[str]) -> list[str]:
    columns = [name.strip().lower() for name in row]
    for name in _COLUMNS:
        if columns.count(name) != 1:
            many = "no column" if name not in columns else "more than one column"
            _refuse(path, line, f"{many} {name!r}; this line names the columns, separated by commas, once each")
    return columns


def _fields(path: Path, line: int, row: list[str], columns: list[str]) -> tuple[str, str]:
    if len(row) != len(columns):
        _refuse(path, line, f"{len(row)} fields, but the header has {len(columns)}; put texts into double quotes")
    label, text = (_plain(row[columns.index(name)]) for name in _COLUMNS)
    if not label or not text:
        _refuse(path, line, f"the {'text' if label else 'label'} is empty; fill it in or remove the row")
    return label, text


def _plain(field: str) -> str:
    return " ".join(unicodedata.normalize("NFC", field).split())


def _refuse(path: Path, line: int, why: str) -> NoReturn:
    raise ConfigError(f"{path}, line {line}: {why}")
