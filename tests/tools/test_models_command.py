from __future__ import annotations

import hashlib
import io
import json
import struct
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from models.catalog import Hub, LocalFile, read
from protocol.errors import BadModelFile, ConfigError, UnknownModel, UnsafePath
from tools.commands.models import models
from tools.progress import ProgressBar


def gguf(path: Path) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    values = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.context_length") + struct.pack("<II", 4, 512),
        text("general.file_type") + struct.pack("<II", 4, 15),
    ]
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(values)) + b"".join(values))
    return path


class Command:
    """`skerry models ...` with folders of its own."""

    def __init__(self, home: Path) -> None:
        self.models = home / "models"
        self._env = {"SKERRY_MODELS": str(self.models), "XDG_CONFIG_HOME": str(home / "config")}

    def run(self, *arguments: str) -> Result:
        return CliRunner(env=self._env).invoke(models, arguments)

    def json(self, *arguments: str) -> object:
        result = self.run(*arguments, "--json")
        assert result.exception is None, result.output
        return json.loads(result.stdout)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def states(command: Command) -> dict[str, str]:
    rows = command.json("list")
    assert isinstance(rows, list)
    return {row["id"]: row["state"] for row in rows}


def test_the_life_of_a_users_own_model(command: Command, tmp_path: Path) -> None:
    file = gguf(tmp_path / "original.gguf")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    command.json("add", "mine", "--file", str(file), "--licence", "MIT")
    assert states(command)["mine"] == "absent"
    listed = command.json("list")
    assert isinstance(listed, list)
    row = next(row for row in listed if row["id"] == "mine")
    assert (row["architecture"], row["quantisation"], row["context"]) == ("llama", "Q4_K_M", 512)
    assert (row["licence"], row["sha256"], row["shipped"]) == ("MIT", digest, False)

    path = str(command.models / "mine.gguf")
    pulled = {"id": "mine", "path": path, "sha256": digest, "already_there": False, "source": str(file)}
    assert command.json("pull", "mine") == [pulled | {"passed_over": []}]
    assert states(command)["mine"] == "verified"
    assert command.json("path", "mine") == {"id": "mine", "path": path}
    assert command.run("path", "mine").stdout == f"{path}\n"
    again = command.run("pull", "mine")
    assert "already there, nothing to do" in again.stderr
    assert again.stdout == ""

    assert command.json("rm", "mine") == {
        "id": "mine",
        "removed": [path, f"{path}.sha256.json", f"entry in {tmp_path}/config/skerry/models.d/mine.toml"],
    }
    assert "mine" not in states(command)


def test_verify_reads_the_file_whatever_was_remembered(command: Command, tmp_path: Path) -> None:
    command.json("add", "mine", "--file", str(gguf(tmp_path / "original.gguf")))
    command.json("pull", "mine")
    assert command.run("verify").exit_code == 0
    path = command.models / "mine.gguf"
    damaged = path.read_bytes()[:-1] + b"\xff"
    path.write_bytes(damaged)
    result = command.run("verify", "mine", "--json")
    assert isinstance(result.exception, BadModelFile)
    assert "run `skerry models pull mine`" in str(result.exception)
    (row,) = json.loads(result.stdout)
    assert (row["state"], row["sha256"]) == ("damaged", hashlib.sha256(damaged).hexdigest())
    assert states(command)["mine"] == "damaged"
    command.json("pull", "mine")
    assert states(command)["mine"] == "verified"


def test_add_from_an_address_needs_what_cannot_be_read(command: Command) -> None:
    result = command.run("add", "far", "--url", "https://example.org/x.gguf", "--size", "10")
    assert isinstance(result.exception, ConfigError)
    assert "missing required field" in str(result.exception)
    given = ("--size", "10", "--sha256", "0" * 64, "--context", "128")
    assert command.run("add", "far", "--hub", "me/repo:x.gguf", *given).exit_code == 0
    assert states(command)["far"] == "absent"
    both = command.run("add", "far2", "--url", "https://example.org/x", "--hub", "me/repo:x", *given)
    assert both.exit_code == 2
    assert "exactly one of" in both.stderr


FILES = {
    "model.onnx": b"graph",
    "model.onnx.data": b"weights",
    "config.json": b'{"model_type": "llama", "max_position_embeddings": 512}',
}


def onnx(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def row_of(command: Command, model: str) -> dict[str, object]:
    rows = command.json("list")
    assert isinstance(rows, list)
    return next(row for row in rows if row["id"] == model)


def test_the_life_of_a_folder(command: Command, tmp_path: Path) -> None:
    folder = onnx(tmp_path / "original")
    command.json("add", "mine", "--file", str(folder / "model.onnx"), "--quantisation", "int4")
    row = row_of(command, "mine")
    assert (row["architecture"], row["quantisation"], row["context"]) == ("llama", "int4", 512)
    assert (row["size"], row["state"]) == (sum(map(len, FILES.values())), "absent")

    path = str(command.models / "mine")
    (pulled,) = json.loads(command.run("pull", "mine", "--json").stdout)
    assert (pulled["path"], pulled["source"]) == (path, str(folder))
    assert row_of(command, "mine")["state"] == "verified"
    assert command.run("path", "mine").stdout == f"{path}\n"
    assert command.run("verify").exit_code == 0
    assert "already there, nothing to do" in command.run("pull", "mine").stderr
    assert command.json("rm", "mine") == {
        "id": "mine",
        "removed": [path, f"{path}.sha256.json", f"entry in {tmp_path}/config/skerry/models.d/mine.toml"],
    }
    assert not Path(path).exists()
    assert (folder / "model.onnx").exists()


def test_verify_names_the_damaged_files_and_pull_repairs_them(command: Command, tmp_path: Path) -> None:
    folder = onnx(tmp_path / "original", FILES | {"manifest.json": b"{}"})
    command.json("add", "mine", "--file", str(folder))
    command.json("pull", "mine")
    onnx(command.models / "mine", {"model.onnx.data": b"WEIGHTS", "manifest.json": b"[]"})
    result = command.run("verify", "mine")
    assert isinstance(result.exception, BadModelFile)
    assert "mine: damaged" in result.stdout
    assert "not as in the catalog: manifest.json, model.onnx.data\n" in result.stdout
    command.json("pull", "mine")
    onnx(command.models / "mine", {"manifest.json": b"[]"})
    assert "not as in the catalog: manifest.json\n" in command.run("verify", "mine").stdout
    command.json("pull", "mine")
    assert command.run("verify").exit_code == 0


def test_entry_for_others_from_a_folder_that_is_here(command: Command, tmp_path: Path) -> None:
    manifest = {"architecture": "llama", "quantisation": "int4", "licence": "MIT", "context": 256, "inputs": {}}
    folder = onnx(tmp_path / "original", FILES | {"manifest.json": json.dumps(manifest).encode()})
    for model, hub, inside in (("mine", "me/repo:int4", "int4"), ("whole", "me/repo", ".")):
        command.json("add", model, "--file", str(folder), "--hub", hub)
        (entry,) = read(tmp_path / "config" / "skerry" / "models.d" / f"{model}.toml")
        assert entry.sources == [Hub("me/repo", inside), LocalFile(str(folder))]
        assert (entry.file, entry.context, entry.licence, entry.quantisation) == (model, 256, "MIT", "int4")
        assert {part.path for part in entry.files} == {*FILES, "manifest.json"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b'{"context": "long"}', "manifest.json: context is 'long', expected int"),
        ("manifest.json", b"[1]", "manifest.json: not a JSON object"),
        ("config.json", b"{", "config.json: not JSON"),
    ],
)
def test_folder_with_broken_descriptions(
    command: Command, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = onnx(tmp_path / "original", FILES | {name: content})
    result = command.run("add", "mine", "--file", str(folder))
    assert isinstance(result.exception, BadModelFile)
    assert message in str(result.exception)


def test_what_cannot_be_added(command: Command, tmp_path: Path) -> None:
    folder = onnx(tmp_path / "original")
    (folder / "link").symlink_to("/etc/hostname")
    result = command.run("add", "mine", "--file", str(folder))
    assert isinstance(result.exception, BadModelFile)
    assert "the link link leaves the folder" in str(result.exception)
    (folder / "link").rename(folder / ".hidden")
    (folder / "read me.txt").write_bytes(b"x")
    result = command.run("add", "mine", "--file", str(folder))
    assert isinstance(result.exception, UnsafePath)
    assert "'read me.txt' is not a plain path" in str(result.exception)
    (folder / "read me.txt").unlink()
    (folder / "config.json").unlink()
    result = command.run("add", "mine", "--file", str(folder))
    assert isinstance(result.exception, ConfigError)
    assert "missing required field `context`" in str(result.exception)
    assert command.run("add", "mine", "--file", str(folder), "--context", "64").exit_code == 0


@pytest.mark.parametrize("action", ["pull", "verify", "path", "rm"])
def test_unknown_id(command: Command, action: str) -> None:
    result = command.run(action, "nope")
    assert isinstance(result.exception, UnknownModel)
    assert "smollm2-135m" in str(result.exception)


def test_shipped_entry_stays_when_its_file_goes(command: Command) -> None:
    assert "nothing to remove" in command.run("rm", "smollm2-135m").stdout
    assert "smollm2-135m" in command.run("list").stdout


@pytest.mark.parametrize("name", sorted(models.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(models, [name, "--help"])
    assert result.exit_code == 0
    assert f"skerry models {name}" in result.stdout.partition("Example:")[2]
    assert any(isinstance(option, click.Option) and "--json" in option.opts for option in models.commands[name].params)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_redraws_one_line() -> None:
    screen = Terminal()
    times = iter([0.0, 1.0, 1.01, 2.0])
    bar = ProgressBar("tiny", screen, lambda: next(times))
    for done in (0, 50_000_000, 51_000_000, 100_000_000):
        bar("http://example.org", done, 100_000_000)
    bar.close()
    lines = screen.getvalue().split("\n")
    assert lines[0] == "tiny: from http://example.org"
    drawn = lines[1].split("\r")[1:]
    assert len(drawn) == 3, "what comes within a tenth of a second is not drawn"
    assert drawn[1] == "[############............]  50 %  50.0 of 100.0 MB  50.0 MB/s  0:01 left\x1b[K"
    assert lines[2] == ""


def test_progress_elsewhere_is_a_line_every_tenth() -> None:
    log = io.StringIO()
    times = iter(range(1000))
    bar = ProgressBar("tiny", log, lambda: float(next(times)))
    for done in range(0, 101):
        bar("a", done * 1000, 100_000)
    bar.close()
    lines = log.getvalue().splitlines()
    assert len(lines) == 12
    assert "\r" not in log.getvalue()
    assert lines[6].startswith("tiny:  50 %  0.1 of 0.1 MB")
