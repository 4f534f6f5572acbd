from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from models.catalog import Entry, Hub, LocalFile
from models.fingerprint import recall
from models.pull import pull
from models.store import state
from protocol.errors import DiskFull, HashMismatch, PullError, PullLocked, ReadOnlyFolder, SourceUnreachable, UnsafePath
from tests.models.child_pull import outcome, start
from tests.models.conftest import FileServer

Build = Callable[..., Entry]
Env = dict[str, str]

WEIGHTS = random.Random(8).randbytes(700_001)
FILES = {
    "tokenizer.json": b"{}",
    "weights/model.onnx.data": WEIGHTS,
    "model.onnx": b"graph",
    "empty.txt": b"",
    "manifest.json": b'{"made": "here"}',
}
TOTAL = sum(map(len, FILES.values()))


@pytest.fixture(autouse=True)
def served(server: FileServer) -> None:
    server.files = dict(FILES)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def asked(server: FileServer) -> list[str]:
    return [path for path, _ in server.ranges]


def test_pull_shows_progress_of_the_whole_and_leaves_nothing_else(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    seen: list[tuple[str, int, int]] = []
    url = server.url("honest")
    entry = folder_entry(FILES, url)
    result = pull(entry, folder, env=env, progress=lambda *step: seen.append(step))
    assert (result.path, result.source, result.failed) == (folder / "tiny", url, ())
    assert content_of(result.path) == FILES
    assert names(folder) == {"tiny", "tiny.sha256.json"}
    assert {source for source, _, _ in seen} == {url}
    assert seen[-1] == (url, TOTAL, TOTAL)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    before = len(server.ranges)
    assert pull(entry, folder, env=env).source is None
    assert len(server.ranges) == before, "the second pull asks nobody"


def test_hub_folder_and_root_of_a_repository(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    env = env | {"HF_ENDPOINT": server.url("").rstrip("/")}
    pull(folder_entry(FILES, Hub("me/repo", "onnx/int4")), folder, env=env)
    assert "/me/repo/resolve/main/onnx/int4/weights/model.onnx.data" in asked(server)
    pull(folder_entry(FILES, Hub("me/repo", "."), file="other"), folder, env=env)
    assert "/me/repo/resolve/main/weights/model.onnx.data" in asked(server)
    assert content_of(folder / "tiny") == content_of(folder / "other") == FILES


def test_local_folder_is_copied(folder_entry: Build, folder: Path, env: Env, tmp_path: Path) -> None:
    original = write(tmp_path / "original", FILES | {"notes.txt": b"not in the catalog"})
    result = pull(folder_entry(FILES, LocalFile(str(original))), folder, env=env)
    assert result.source == str(original)
    assert content_of(result.path) == FILES


def test_killed_pull_goes_on_where_it_was(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    process = start(folder_entry(FILES, server.url("paused")), folder, env)
    assert server.half_sent.wait(30)
    partial = folder / "tiny.partial" / "weights" / "model.onnx.data.partial"
    while not partial.exists() or partial.stat().st_size < len(WEIGHTS) // 2:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    outcome(process)
    assert not (folder / "tiny").exists()
    server.ranges.clear()
    entry = folder_entry(FILES, server.url("honest"))
    assert state(entry, folder) == "partial"
    assert content_of(pull(entry, folder, env=env).path) == FILES
    assert server.ranges[0] == ("/honest/weights/model.onnx.data", f"bytes={len(WEIGHTS) // 2}-")
    assert "/honest/tokenizer.json" not in asked(server), "what was there whole is not fetched again"
    assert names(folder) == {"tiny", "tiny.sha256.json"}


def test_all_files_there_but_not_yet_renamed(folder_entry: Build, folder: Path, env: Env, refused: str) -> None:
    write(folder / "tiny.partial", FILES)
    write(folder / "tiny.old", {"model.onnx": b"older version"})
    result = pull(folder_entry(FILES, refused), folder, env=env)
    assert content_of(result.path) == FILES
    assert names(folder) == {"tiny", "tiny.sha256.json"}


def test_what_an_older_catalog_left_is_not_published(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    stale = {"old.bin": b"x", "model.onnx/part": b"x", "weights/model.onnx.data": b"x", "tokenizer.json.partial": b"!"}
    write(folder / "tiny.partial", stale)
    assert content_of(pull(folder_entry(FILES, server.url("honest")), folder, env=env).path) == FILES


def test_staging_that_is_a_file(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    write(folder, {"tiny.partial": b"of a model that was one file"})
    assert content_of(pull(folder_entry(FILES, server.url("honest")), folder, env=env).path) == FILES


def test_damaged_folder_is_replaced_and_its_good_files_are_kept(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    entry = folder_entry(FILES, server.url("honest"))
    write(folder / "tiny", FILES | {"model.onnx": b"GRAPH", "surprise.bin": b"x"})
    write(folder / "tiny.old", {"model.onnx": b"of a pull that was killed"})
    write(folder / "tiny.partial", {"tokenizer.json.partial": b"{"})
    assert content_of(pull(entry, folder, env=env).path) == FILES
    assert asked(server) == ["/honest/model.onnx"]
    assert names(folder) == {"tiny", "tiny.sha256.json"}


def test_manifest_of_another_content_is_fetched_again(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    entry = folder_entry(FILES, server.url("honest"))
    write(folder / "tiny", FILES | {"manifest.json": b'{"made": "away"}'})
    assert state(entry, folder) == "unverified"
    assert content_of(pull(entry, folder, env=env).path) == FILES
    assert asked(server) == ["/honest/manifest.json"]


def test_file_of_that_name_is_replaced(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    write(folder, {"tiny": b"a file"})
    assert content_of(pull(folder_entry(FILES, server.url("honest")), folder, env=env).path) == FILES
    assert names(folder) == {"tiny", "tiny.sha256.json"}


def test_link_of_that_name_is_replaced_and_its_target_stays(
    server: FileServer, folder_entry: Build, folder: Path, env: Env, tmp_path: Path
) -> None:
    target = write(tmp_path / "elsewhere", {"model.onnx": b"older version"})
    folder.mkdir()
    (folder / "tiny").symlink_to(target)
    assert content_of(pull(folder_entry(FILES, server.url("honest")), folder, env=env).path) == FILES
    assert not (folder / "tiny").is_symlink()
    assert content_of(target) == {"model.onnx": b"older version"}


def test_dead_source_is_asked_once_and_the_next_one_serves(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    dead, alive = server.url("missing"), server.url("honest")
    result = pull(folder_entry(FILES, dead, alive), folder, env=env)
    assert content_of(result.path) == FILES
    assert result.source == alive
    assert len(result.failed) == 1
    assert result.failed[0].startswith(f"{dead}/tokenizer.json: answers HTTP 404")


def test_source_without_one_of_the_files(
    server: FileServer, folder_entry: Build, folder: Path, env: Env, tmp_path: Path
) -> None:
    local = write(tmp_path / "local", {name: content for name, content in FILES.items() if name != "model.onnx"})
    result = pull(folder_entry(FILES, LocalFile(str(local)), server.url("honest")), folder, env=env)
    assert content_of(result.path) == FILES
    assert result.source == f"{local} and {server.url('honest')}"
    assert result.failed == (f"{local}/model.onnx: cannot be read: No such file or directory",)


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("lie", HashMismatch, "has another content: SHA-256"),
        ("short", HashMismatch, r"has 1 bytes, the catalog names 2"),
        ("missing", SourceUnreachable, "HTTP 404"),
    ],
)
def test_what_was_there_before_stays(
    server: FileServer, folder_entry: Build, folder: Path, env: Env, path: str, kind: type[PullError], reason: str
) -> None:
    write(folder / "tiny", {"model.onnx": b"older version"})
    with pytest.raises(kind, match=reason):
        pull(folder_entry(FILES, server.url(path)), folder, env=env)
    assert content_of(folder / "tiny") == {"model.onnx": b"older version"}
    assert names(folder) == {"tiny"}, "what a liar sent is not kept"


def test_broken_off_pull_says_what_is_kept(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    with pytest.raises(SourceUnreachable, match=r"broke off(?s:.*)\n0\.6 MB are kept; the next pull goes on there"):
        pull(folder_entry(FILES, server.url("breaking")), folder, env=env)
    assert names(folder) == {"tiny.partial"}


def test_failed_pull_says_what_is_kept_of_all_files(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    write(folder / "tiny.partial", {"weights/model.onnx.data": WEIGHTS})
    with pytest.raises(SourceUnreachable, match=r"HTTP 404(?s:.*)\n0\.7 MB are kept; the next pull goes on there"):
        pull(folder_entry(FILES, server.url("missing")), folder, env=env)
    assert content_of(folder) == {"tiny.partial/weights/model.onnx.data": WEIGHTS}


def test_no_room_is_said_before_anything_is_fetched(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    write(folder / "tiny.partial", {"weights/model.onnx.data.partial": WEIGHTS[:-100_000]})
    entry = folder_entry(FILES, server.url("honest"))
    with pytest.raises(DiskFull, match=r"tiny needs 16\.9 MB in .*, 2\.0 MB are free"):
        pull(entry, folder, env=env, free_space=lambda _: 2_000_000)
    assert server.ranges == []
    assert len(content_of(folder / "tiny.partial")["weights/model.onnx.data.partial"]) == len(WEIGHTS) - 100_000


def test_disk_that_fills_up_on_the_way(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    write(folder / "tiny", {"model.onnx": b"older version"})
    said = outcome(start(folder_entry(FILES, server.url("honest")), folder, env, largest_file=300_000))
    assert said.startswith("DiskFull no space left for")
    assert names(folder) == {"tiny"}, "the space is given back"
    assert content_of(folder / "tiny") == {"model.onnx": b"older version"}


def test_read_only_folder(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    folder.mkdir()
    folder.chmod(0o555)
    said = outcome(start(folder_entry(FILES, server.url("honest")), folder, env, drop=True))
    assert said.startswith(ReadOnlyFolder.__name__)
    assert server.ranges == []


def test_two_pulls_at_once(server: FileServer, folder_entry: Build, folder: Path, env: Env) -> None:
    first = start(folder_entry(FILES, server.url("paused")), folder, env)
    assert server.half_sent.wait(30)
    with pytest.raises(PullLocked, match=f"process {first.pid} is working on tiny"):
        pull(folder_entry(FILES, server.url("honest")), folder, env=env)
    server.go_on.set()
    assert outcome(first).strip() == server.url("paused")
    assert content_of(folder / "tiny") == FILES


@pytest.mark.parametrize(
    "path", ["../up", "/tmp/up", "a/../../up", ".hidden", "a/.hidden/b", "a//b", "a\\b", "a b", "x\n"]
)
def test_file_outside_the_folder_is_refused_before_anything_is_touched(
    folder_entry: Build, folder: Path, env: Env, refused: str, path: str
) -> None:
    with pytest.raises(UnsafePath, match="is not a plain path in the folder"):
        pull(folder_entry(FILES | {path: b"x"}, refused), folder, env=env)
    assert not folder.exists()


def test_the_sidecar_speaks_of_the_published_folder(
    server: FileServer, folder_entry: Build, folder: Path, env: Env
) -> None:
    entry = folder_entry(FILES, server.url("honest"))
    path = pull(entry, folder, env=env).path
    assert recall(path) == entry.sha256
    assert state(entry, folder) == "verified"
    os.utime(path / "tokenizer.json", ns=(0, 1))
    assert state(entry, folder) == "unverified"
