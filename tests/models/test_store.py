from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from models.catalog import DEFAULT, Entry
from models.entries import add_entry
from models.fingerprint import fingerprint, measure, recall, remember, sidecar
from models.gguf_header import GgufHeader, read_header
from models.partial import locked
from models.store import Places, differences, remove_files, resolve_model, state
from protocol.errors import BadModelFile, PullLocked, UnknownModel

Build = Callable[..., Entry]

GGUF = b"GGUF" + bytes(96)
SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def places(tmp_path: Path, entry_of: Build) -> Places:
    """One entry, tiny, whose content is GGUF; not pulled."""
    places = Places(tmp_path / "models", tmp_path / "models.d")
    places.models.mkdir()
    add_entry(entry_of("http://127.0.0.1:1/x", content=GGUF), places.entries)
    return places


def test_fingerprint_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert recall(path) is None
    assert fingerprint(path) == SHA256_OF_ABC
    assert recall(path) == SHA256_OF_ABC
    remember(path, "0" * 64)
    assert fingerprint(path) == "0" * 64, "the sidecar answers, the file is not read"
    assert measure(path) == SHA256_OF_ABC, "the file is read, whatever the sidecar says"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert recall(path) is None
    assert fingerprint(path) == SHA256_OF_ABC


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"size": 3}', b'{"size":3,"mtime_ns":0,"sha256":"x"}', b"\xff"])
def test_damaged_or_old_sidecar_is_ignored(tmp_path: Path, note: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    sidecar(path).write_bytes(note)
    assert fingerprint(path) == SHA256_OF_ABC
    assert json.loads(sidecar(path).read_bytes())["sha256"] == SHA256_OF_ABC
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "file.sha256.json"}


def test_places_follow_the_environment(tmp_path: Path) -> None:
    assert Places.of({"SKERRY_MODELS": str(tmp_path)}).models == tmp_path
    assert Places.of({}).models.parts[-2:] == ("skerry", "models")
    assert Places.of({}).entries.name == "models.d"


def test_states_of_a_model(places: Places, entry_of: Build) -> None:
    entry = entry_of("http://127.0.0.1:1/x", content=GGUF)
    path = places.models / entry.file
    assert state(entry, places.models) == "absent"
    partial = places.models / "tiny.gguf.partial"
    partial.write_bytes(b"G")
    assert state(entry, places.models) == "partial"
    path.write_bytes(GGUF[:-1])
    assert state(entry, places.models) == "damaged"
    path.write_bytes(GGUF)
    assert state(entry, places.models) == "unverified"
    measure(path)
    assert state(entry, places.models) == "verified"
    path.write_bytes(bytes(len(GGUF)))
    measure(path)
    assert state(entry, places.models) == "damaged"


def test_resolving_an_id(places: Places) -> None:
    with pytest.raises(BadModelFile, match="tiny is not pulled yet: run `skerry models pull tiny`"):
        resolve_model("tiny", places)
    path = places.models / "tiny.gguf"
    path.write_bytes(GGUF[:-1])
    with pytest.raises(BadModelFile, match="has 99 bytes instead of 100: run `skerry models pull tiny`"):
        resolve_model("tiny", places)
    path.write_bytes(GGUF[:-1] + b"!")
    with pytest.raises(BadModelFile, match="another content"):
        resolve_model("tiny", places)
    path.write_bytes(GGUF)
    assert resolve_model("tiny", places) == path


def test_resolving_a_path(places: Places, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    with pytest.raises(BadModelFile, match=r"mine\.gguf: cannot be read: No such file"):
        resolve_model(str(mine), places)
    mine.write_bytes(b"PK")
    with pytest.raises(BadModelFile, match="not a GGUF file"):
        resolve_model(str(mine), places)
    mine.write_bytes(GGUF)
    assert resolve_model(str(mine), places) == mine


def test_resolving_something_unknown_lists_the_ids(places: Places) -> None:
    with pytest.raises(UnknownModel, match=rf"'smollm3'.*ids: {DEFAULT}, .*tiny"):
        resolve_model("smollm3", places)


def test_removing_takes_everything_of_the_model_but_not_during_a_pull(places: Places, entry_of: Build) -> None:
    entry = entry_of("http://127.0.0.1:1/x", content=GGUF)
    assert remove_files(entry, places.models) == []
    for name in ("tiny.gguf", "tiny.gguf.partial", "tiny.gguf.sha256.json", "other.gguf"):
        (places.models / name).write_bytes(b"x")
    (places.models / "tiny.gguf.wheels" / "part1==1.0").mkdir(parents=True)
    with locked(places.models / "tiny.gguf"), pytest.raises(PullLocked):
        remove_files(entry, places.models)
    assert len(remove_files(entry, places.models)) == 4
    assert [path.name for path in places.models.iterdir()] == ["other.gguf"]


FILES = {"model.onnx": b"graph", "sub/model.onnx.data": b"weights"}


@pytest.fixture
def folder_model(places: Places, folder_entry: Build) -> Entry:
    """A second entry, which is a folder; not pulled."""
    entry = folder_entry(FILES, "http://127.0.0.1:1/x", id="onnx", file="onnx-model")
    add_entry(entry, places.entries)
    return entry


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_states_of_a_folder(places: Places, folder_model: Entry) -> None:
    path = places.models / "onnx-model"
    assert state(folder_model, places.models) == "absent"
    write(places.models / "onnx-model.partial")
    assert state(folder_model, places.models) == "partial"
    write(path, {"model.onnx": b"graph"})
    assert state(folder_model, places.models) == "damaged"
    write(path)
    assert state(folder_model, places.models) == "unverified"
    measure(path)
    assert state(folder_model, places.models) == "verified"
    write(path, {"model.onnx": b"GRAPH"})
    assert state(folder_model, places.models) == "unverified"
    measure(path)
    assert state(folder_model, places.models) == "damaged"
    write(path)
    (path / "link").symlink_to("/etc/hostname")
    assert state(folder_model, places.models) == "damaged"


def test_resolving_the_id_of_a_folder(places: Places, folder_model: Entry) -> None:
    path = places.models / "onnx-model"
    with pytest.raises(BadModelFile, match="onnx is not pulled yet: run `skerry models pull onnx`"):
        resolve_model("onnx", places)
    write(path, FILES | {"surprise.bin": b"x"})
    with pytest.raises(BadModelFile, match="has 13 bytes instead of 12: run `skerry models pull onnx`"):
        resolve_model("onnx", places)
    (path / "surprise.bin").unlink()
    (path / "model.onnx").write_bytes(b"GRAPH")
    with pytest.raises(BadModelFile, match="another content"):
        resolve_model("onnx", places)
    write(path)
    assert resolve_model("onnx", places) == path
    (path / "link").symlink_to("/etc/hostname")
    with pytest.raises(BadModelFile, match="cannot be read: the link link leaves the folder"):
        resolve_model("onnx", places)


def test_resolving_a_path_to_a_folder(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = write(tmp_path / "mine")
    assert resolve_model(str(mine), places) == mine
    assert resolve_model(str(mine / "model.onnx"), places) == mine
    monkeypatch.chdir(mine / "sub")
    assert resolve_model("..", places) == mine
    with pytest.raises(BadModelFile, match=r"a folder without a model\.onnx"):
        resolve_model(".", places)


def test_differences_name_the_files(places: Places, folder_model: Entry) -> None:
    path = write(places.models / "onnx-model", {"model.onnx": b"GRAPH", "surprise.bin": b"x"})
    assert differences(path, folder_model) == ["model.onnx", "sub/model.onnx.data", "surprise.bin"]


def test_removing_a_folder_keeps_what_a_link_names(places: Places, folder_model: Entry, tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere")
    (places.models / "onnx-model").symlink_to(elsewhere)
    for name in ("onnx-model.partial", "onnx-model.old"):
        write(places.models / name)
    (places.models / "onnx-model.sha256.json").write_bytes(b"x")
    assert len(remove_files(folder_model, places.models)) == 4
    assert list(places.models.iterdir()) == []
    assert (elsewhere / "model.onnx").exists()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def test_gguf_header(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    values = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 1.5),
        text("llama.context_length") + struct.pack("<II", 4, 8192),
        text("general.file_type") + struct.pack("<II", 4, 3),
    ]
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(values)) + b"".join(values)
    path.write_bytes(header)
    assert read_header(path) == GgufHeader("llama", "Q4_1", "unknown", 8192)
    for damaged in (header[:-1], header[:60], b"GGUF", b"", b"PK" + header[2:]):
        path.write_bytes(damaged)
        with pytest.raises(BadModelFile, match="not a GGUF file, or its header is damaged"):
            read_header(path)
