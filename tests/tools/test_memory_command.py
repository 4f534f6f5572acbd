from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.memory.memory import EntryMemory
from protocol.errors import StoreError
from protocol.memory import Entry, sign_entry
from tools.commands.memory import memory

SPACES = b"first space....."[:16], b"second space...."[:16]
DEVICES = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2)]
ORIGINS = [device.public_key().public_bytes_raw() for device in DEVICES]


def entries(count: int, space: bytes = SPACES[0], device: int = 0) -> list[Entry]:
    found = np.random.default_rng(device).integers(1, 128, (count, 24)).astype(np.int8)
    return [
        sign_entry(
            Entry(space, key.tobytes(), n.to_bytes(8, "little"), n, 0.5, 1, 1_760_000_000, ORIGINS[device]),
            DEVICES[device].sign,
        )
        for n, key in enumerate(found)
    ]


class Command:
    """`skerry memory ...` of a user with this home."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "data" / "skerry" / "device" / "memory"
        self._env = {
            "SKERRY_DEVICE_FOLDER": None,
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_DATA_HOME": str(home / "data"),
        }

    def run(self, *arguments: str) -> Result:
        return CliRunner(env=self._env).invoke(memory, arguments)

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exception is None, result.output
        return json.loads(result.stdout)

    def fails(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert isinstance(result.exception, StoreError), result.output
        return str(result.exception)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture
def filled(command: Command) -> Command:
    with EntryMemory(command.folder) as opened:
        opened.add(entries(20) + entries(10, SPACES[1]) + entries(5, device=1))
        opened.note_audit(ORIGINS[1], True)
    return command


def test_stats_of_a_memory_that_is_not_in_use(filled: Command) -> None:
    found = filled.json("stats")
    assert (found["entries"], found["process"]) == (35, None)
    assert found["folder"] == str(filled.folder)
    assert {of["space"]: (of["width"], of["entries"]) for of in found["spaces"]} == {
        SPACES[0].hex(): (24, 25),
        SPACES[1].hex(): (24, 10),
    }
    assert {of["origin"]: (of["entries"], of["audits"], of["wrong"]) for of in found["origins"]} == {
        ORIGINS[0].hex(): (30, 0, 0),
        ORIGINS[1].hex(): (5, 1, 1),
    }
    assert 0 < found["disk_bytes"] < 10**6
    text = filled.run("stats").stdout
    assert SPACES[0].hex() in text
    assert ORIGINS[1].hex() in text
    assert "35 entries" in text


def test_stats_and_export_while_the_agent_runs(filled: Command, tmp_path: Path) -> None:
    with EntryMemory(filled.folder) as opened:
        opened.add(entries(30))
        opened.forget_origin(ORIGINS[1])
        opened.flush()
        found = filled.json("stats")
        assert (found["entries"], found["process"]) == (40, os.getpid())
        (gone,) = [of for of in found["origins"] if of["quarantined"]]
        assert (gone["origin"], gone["entries"], gone["dropped"]) == (ORIGINS[1].hex(), 0, 5)
        assert "quarantined, 5 entries dropped" in filled.run("stats").stdout
        assert filled.json("export", str(tmp_path / "out")) == {"file": str(tmp_path / "out"), "entries": 40}
        assert "in use by process" in filled.fails("clear", "--all")
        assert "in use by process" in filled.fails("import", str(tmp_path / "out"))
        assert opened.stats().entries == 40


def test_a_memory_moves_to_another_device(filled: Command, tmp_path: Path) -> None:
    file, other = str(tmp_path / "out"), str(tmp_path / "elsewhere")
    assert "35 entries" in filled.run("export", file).stdout
    assert filled.json("import", file, "--folder", other) == {"file": file, "new": 35, "known": 0, "refused": 0}
    assert filled.json("stats", "--folder", other)["entries"] == 35
    assert "0 new entries, 35 that were known" in filled.run("import", file, "--folder", other).stdout


def test_forged_entries_are_not_imported(filled: Command, tmp_path: Path) -> None:
    file = tmp_path / "out"
    filled.json("export", str(file))
    header, first, *rest = file.read_text().splitlines()
    forged = json.loads(first)
    forged[3] += 1
    file.write_text("\n".join([header, json.dumps(forged), "nonsense", *rest]))
    done = filled.json("import", str(file), "--folder", str(tmp_path / "elsewhere"))
    assert (done["new"], done["refused"]) == (34, 2)


def test_clear(filled: Command) -> None:
    assert filled.json("clear", "--space", SPACES[1].hex()) == {"cleared": 10}
    assert filled.json("clear", "--origin", ORIGINS[1].hex()) == {"cleared": 5}
    assert filled.json("stats")["entries"] == 20
    assert "20 entries forgotten" in filled.run("clear", "--all").stdout
    assert filled.json("stats")["entries"] == 0


@pytest.mark.parametrize(
    "arguments", [[], ["--all", "--space", "00" * 16], ["--space", "00"], ["--origin", "zz" * 32], ["--space", "x"]]
)
def test_clear_wants_to_know_exactly_what(filled: Command, arguments: list[str]) -> None:
    result = filled.run("clear", *arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert filled.json("stats")["entries"] == 35


def test_the_configured_folder_is_the_default(command: Command, tmp_path: Path) -> None:
    with EntryMemory(tmp_path / "device" / "memory") as opened:
        opened.add(entries(3))
    config = tmp_path / "agent.toml"
    config.write_text(f'[device]\nfolder = "{tmp_path}/device"\n')
    assert command.json("stats", "--config", str(config))["entries"] == 3


def test_nothing_there_and_nothing_readable(command: Command, tmp_path: Path) -> None:
    assert "nothing has been learned" in command.fails("stats")
    assert "nothing has been learned" in command.fails("export", str(tmp_path / "out"))
    assert not command.folder.exists(), "looking creates nothing"
    command.folder.mkdir(parents=True)
    (command.folder / "memory.db").write_bytes(b"garbage" * 1000)
    assert "cannot be read" in command.fails("stats")
    assert "cannot be read" in command.fails("import", str(tmp_path / "missing"))
