"""Memories on the move: JSON lines, a header and then one entry as its origin signed it per line.

    {"skerry_memory": 1, "fields": ["space", "key", "tail", "token", "p", "count", "time", "origin", "signature"]}
    ["<base64>", "<base64>", "<base64>", 1234, 0.93, 1, 1760000000, "<base64>", "<base64>"]

What this device thinks of an entry (trust, hits) stays here: another one makes up its own mind.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.memory.memory_admit import check
from agent.memory.store_reader import connect, whole_entries
from protocol.errors import ProtocolError, StoreError
from protocol.memory import Entry

FORMAT = 1
_LONGEST = 1 << 17  # bytes of a line
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Imported:
    """`known` were there already, or are of no use here; `refused` were malformed or not accepted."""

    new: int
    known: int
    refused: int


class _Header(msgspec.Struct):
    skerry_memory: int


def export(database: Path, path: Path) -> int:
    """Returns how many. The file is complete when it appears. Raises StoreError."""
    part = path.with_name(f"{path.name}.part")
    header = {"skerry_memory": FORMAT, "fields": list(Entry.__struct_fields__)}
    count = 0
    try:
        with contextlib.closing(connect(database)) as connection, part.open("wb") as file:
            file.write(msgspec.json.encode(header) + b"\n")
            for _, entry in whole_entries(connection):
                file.write(msgspec.json.encode(entry) + b"\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise StoreError(f"the memory could not be exported to {path}: {error}") from None
    return count


def import_(path: Path, add: Callable[[Sequence[Entry]], int], accept: Callable[[Entry], bool]) -> Imported:
    """Raises StoreError if the file can't be read, is no export, or `add` fails; what came before stays added."""
    new = read = refused = 0
    batch: list[Entry] = []
    decoder = msgspec.json.Decoder(Entry)
    try:
        with path.open("rb") as file:
            _check_header(path, file.readline(_LONGEST))
            while line := file.readline(_LONGEST):
                try:
                    entry = decoder.decode(line)
                    check(entry)
                except (msgspec.DecodeError, ProtocolError, UnicodeDecodeError):
                    refused += 1
                    continue
                if not accept(entry):
                    refused += 1
                    continue
                batch.append(entry)
                if len(batch) == _BATCH:
                    read += len(batch)
                    new += add(batch)
                    batch = []
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None
    new += add(batch)
    return Imported(new, read + len(batch) - new, refused)


def _check_header(path: Path, line: bytes) -> None:
    try:
        version = msgspec.json.decode(line, type=_Header).skerry_memory
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StoreError(f"{path} is not an exported memory: it lacks the header") from None
    if version != FORMAT:
        raise StoreError(f"{path} has format {version}, this Skerry reads {FORMAT}: export it anew, or update Skerry")
