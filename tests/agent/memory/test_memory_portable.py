from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.memory.memory import EntryMemory
from protocol.errors import StoreError
from tests.agent.memory.memories import ORIGIN, PATIENCE, SPACE, entries, entry, indexed, keys, opened, stored, tokens

OTHER = b"p" * 32


def whole(memory: EntryMemory, count: int) -> list[object]:
    known = keys(count)
    ids = [memory.neighbours(SPACE, key, bytes(8), 1)[0].id for key in known]
    return memory.entries(ids)


def test_what_is_exported_can_be_imported(tmp_path: Path) -> None:
    known = keys(700)
    file = tmp_path / "memory.jsonl"
    with opened(tmp_path / "a") as memory:
        memory.add(entries(known[:600], count=3, p=0.123456789012345, tail=b"\xff\x00\x80\x7fabcd"))
        for n in range(600, 700):
            memory.learn(entry(n, known[n], origin=OTHER, signature=b""))
        assert memory.settle(PATIENCE)
        memory.blame([memory.neighbours(SPACE, known[3], bytes(8), 1)[0].id])
        assert memory.export(file) == 700, "what was learned just now is in it"
        before = whole(memory, 700)
    with opened(tmp_path / "b") as memory:
        done = memory.import_(file)
        assert (done.new, done.known, done.refused) == (700, 0, 0)
        assert whole(memory, 700) == before
        assert memory.neighbours(SPACE, known[3], bytes(8), 1)[0].trust == 1.0, "what a thought of it stays with a"
        again = memory.import_(file)
        assert (again.new, again.known, again.refused) == (0, 700, 0)
        assert memory.settle(PATIENCE)
        assert indexed(memory) == sorted(stored(tmp_path / "b"))


def test_bad_lines_are_counted_and_harm_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    with opened(tmp_path / "a") as memory:
        memory.add(entries(keys(10)))
        memory.export(file)
    header, *lines = file.read_bytes().splitlines(keepends=True)
    fields = json.loads(lines[0])
    bad = [
        b"\n",
        b"{}\n",
        b"[1, 2\n",
        b"\xff\xfe not text\n",
        json.dumps([*fields[:4], 2.5, *fields[5:]]).encode() + b"\n",
        json.dumps([*fields[:3], -1, *fields[4:]]).encode() + b"\n",
        json.dumps(["!", *fields[1:]]).encode() + b"\n",
        json.dumps(fields[:5]).encode() + b"\n",
        b"[" * 5000 + b"\n",
        b'"' + b"x" * 200_000 + b'"\n',
    ]
    mixed = [header]
    for line, wrong in zip(lines, bad, strict=True):
        mixed += [wrong, line]
    file.write_bytes(b"".join(mixed) + lines[0][:-30])
    with opened(tmp_path / "b") as memory:
        done = memory.import_(file)
        assert (done.new, done.known) == (10, 0)
        assert done.refused >= len(bad) + 1
        assert [tokens(memory, key) for key in keys(10)] == [[n] for n in range(10)]


def test_entries_that_are_not_accepted_stay_out(tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    with opened(tmp_path / "a") as memory:
        memory.add(entries(keys(10)) + entries(keys(10, seed=1), first=10, origin=OTHER))
        memory.export(file)
    with opened(tmp_path / "b") as memory:
        done = memory.import_(file, lambda one: one.origin == ORIGIN)
        assert (done.new, done.refused) == (10, 10)
        assert set(stored(tmp_path / "b").values()) == set(range(10))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"[]\n", b'{"skerry_memory": "x"}\n', b"\xff\n"])
def test_a_file_that_is_no_export(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with opened(tmp_path / "m") as memory, pytest.raises(StoreError, match="not an exported memory"):
        memory.import_(tmp_path / "file")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "newer").write_bytes(b'{"skerry_memory": 2}\n')
    with opened(tmp_path / "m") as memory:
        memory.add(entries(keys(3)))
        with pytest.raises(StoreError, match="format 2"):
            memory.import_(tmp_path / "newer")
        with pytest.raises(StoreError, match="cannot be read"):
            memory.import_(tmp_path / "nothing")
        with pytest.raises(StoreError, match="could not be exported"):
            memory.export(tmp_path / "no" / "folder")
        assert memory.stats().entries == 3
