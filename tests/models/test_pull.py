from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from models.catalog import Entry, Hub, LocalFile
from models.download import Timeouts
from models.pull import pull
from protocol.errors import (
    DiskFull,
    HashMismatch,
    PullError,
    PullLocked,
    SourceUnreachable,
    UnsafePath,
)
from tests.models.child_pull import outcome, start
from tests.models.conftest import FileServer

Build = Callable[..., Entry]
Env = dict[str, str]
SHORT = Timeouts(connect=0.3, read=0.3)


def left_overs(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tiny.gguf", "tiny.gguf.sha256.json"}


def half(folder: Path, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.gguf.partial").write_bytes(content[: len(content) // 2])


def test_pull_shows_progress_and_leaves_nothing_else(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    seen: list[tuple[str, int, int]] = []
    url = server.url("honest")
    result = pull(entry_of(url), folder, env=env, progress=lambda *step: seen.append(step))
    assert (result.path, result.source, result.failed) == (folder / "tiny.gguf", url, ())
    assert result.path.read_bytes() == content
    assert left_overs(folder) == set()
    assert seen[-1] == (url, len(content), len(content))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_second_pull_asks_nobody(server: FileServer, entry_of: Build, folder: Path, env: Env) -> None:
    entry = entry_of(server.url("honest"))
    pull(entry, folder, env=env)
    assert pull(entry, folder, env=env).source is None
    assert len(server.ranges) == 1


def test_a_complete_file_from_elsewhere_is_recognised(
    entry_of: Build, folder: Path, env: Env, refused: str, content: bytes
) -> None:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(content)
    assert pull(entry_of(refused), folder, env=env).source is None


def test_hub_and_its_endpoint(server: FileServer, entry_of: Build, folder: Path, env: Env) -> None:
    entry = entry_of(Hub("me/repo", "sub/tiny q4.gguf"))
    result = pull(entry, folder, env=env | {"HF_ENDPOINT": server.url("").rstrip("/")})
    assert result.source == server.url("me/repo/resolve/main/sub/tiny%20q4.gguf")


def test_redirect_is_followed_also_when_resuming(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    half(folder, content)
    pull(entry_of(server.url("redirect")), folder, env=env)
    assert server.ranges[-1] == ("/honest", f"bytes={len(content) // 2}-")


def test_resume_asks_only_for_the_rest(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    half(folder, content)
    result = pull(entry_of(server.url("honest")), folder, env=env)
    assert server.ranges == [("/honest", f"bytes={len(content) // 2}-")]
    assert result.path.read_bytes() == content


def test_server_without_ranges_starts_again(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    half(folder, content)
    assert pull(entry_of(server.url("rangeless")), folder, env=env).path.read_bytes() == content


def test_wrong_beginning_left_by_another_source_gets_a_clean_try(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    half(folder, bytes(len(content)))
    assert pull(entry_of(server.url("honest")), folder, env=env).path.read_bytes() == content
    assert [asked for _, asked in server.ranges] == [f"bytes={len(content) // 2}-", None]


def test_partial_that_is_already_whole_needs_no_source(
    entry_of: Build, folder: Path, env: Env, refused: str, content: bytes
) -> None:
    folder.mkdir()
    (folder / "tiny.gguf.partial").write_bytes(content)
    assert pull(entry_of(refused), folder, env=env).path.read_bytes() == content


def test_broken_connections_are_taken_up_again(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    with pytest.raises(SourceUnreachable, match="broke off after"):
        pull(entry_of(server.url("breaking")), folder, env=env)
    assert len(server.ranges) == 5
    kept = (folder / "tiny.gguf.partial").stat().st_size
    assert pull(entry_of(server.url("honest")), folder, env=env).path.read_bytes() == content
    assert server.ranges[-1] == ("/honest", f"bytes={kept}-")


def test_next_source_when_one_fails_and_the_result_says_why(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes, refused: str, black_hole: str
) -> None:
    bad = [refused, black_hole, server.url("missing"), server.url("lie"), server.url("short"), server.url("endless")]
    result = pull(entry_of(*bad, server.url("honest")), folder, env=env, timeouts=SHORT)
    assert result.path.read_bytes() == content
    assert len(result.failed) == len(bad)
    reasons = ["refused", "silent for more than 0.3 s", "HTTP 404", "SHA-256", "has 1,000,002 bytes", "sends more than"]
    for url, reason, said in zip(bad, reasons, result.failed, strict=True):
        assert said.startswith(f"{url}: ")
        assert reason in said


def test_all_failed_lists_every_source(
    server: FileServer, entry_of: Build, folder: Path, env: Env, refused: str
) -> None:
    with pytest.raises(PullError) as caught:
        pull(entry_of(refused, server.url("lie")), folder, env=env)
    assert type(caught.value) is PullError
    assert refused in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert server.url("lie") in str(caught.value)
    assert list(folder.iterdir()) == [], "what a liar sent is not kept"


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("lie", HashMismatch, "has another content: SHA-256"),
        ("short", HashMismatch, "has 1,000,002 bytes, the catalog names 1,000,003"),
        ("endless", HashMismatch, "sends more than the 1,000,003 bytes"),
        ("broken", SourceUnreachable, "broke off after 1,000 of 1,000,003 bytes"),
        ("missing", SourceUnreachable, "HTTP 404"),
    ],
)
def test_what_was_there_before_stays(
    server: FileServer, entry_of: Build, folder: Path, env: Env, path: str, kind: type[PullError], reason: str
) -> None:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"older version")
    with pytest.raises(kind, match=reason):
        pull(entry_of(server.url(path)), folder, env=env)
    assert (folder / "tiny.gguf").read_bytes() == b"older version"


def test_local_file_is_copied(entry_of: Build, folder: Path, env: Env, content: bytes, tmp_path: Path) -> None:
    original = tmp_path / "original.gguf"
    original.write_bytes(content)
    result = pull(entry_of(LocalFile(str(original))), folder, env=env)
    assert result.path.read_bytes() == original.read_bytes() == content


def test_truncated_local_file(entry_of: Build, folder: Path, env: Env, content: bytes, tmp_path: Path) -> None:
    original = tmp_path / "original.gguf"
    original.write_bytes(content[:-3])
    with pytest.raises(HashMismatch, match="is truncated: 1,000,000 of 1,000,003 bytes"):
        pull(entry_of(LocalFile(str(original))), folder, env=env)
    original.unlink()
    with pytest.raises(SourceUnreachable, match="No such file"):
        pull(entry_of(LocalFile(str(original))), folder, env=env)


def test_no_room_is_said_before_anything_is_fetched(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    half(folder, content)
    with pytest.raises(DiskFull, match=r"tiny needs 17\.3 MB in .*, 2\.0 MB are free"):
        pull(entry_of(server.url("honest")), folder, env=env, free_space=lambda _: 2_000_000)
    assert server.ranges == []
    assert (folder / "tiny.gguf.partial").stat().st_size == len(content) // 2


def test_disk_that_fills_up_on_the_way(server: FileServer, entry_of: Build, folder: Path, env: Env) -> None:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"older version")
    said = outcome(start(entry_of(server.url("honest")), folder, env, largest_file=300_000))
    assert said.startswith("DiskFull no space left for")
    assert left_overs(folder) == set(), "the space is given back"
    assert (folder / "tiny.gguf").read_bytes() == b"older version"


def test_read_only_folder(server: FileServer, entry_of: Build, folder: Path, env: Env) -> None:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"older version")
    folder.chmod(0o555)
    said = outcome(start(entry_of(server.url("honest")), folder, env, drop=True))
    assert said.startswith("ReadOnlyFolder ")
    assert "make the folder writable" in said
    assert server.ranges == []
    assert (folder / "tiny.gguf").read_bytes() == b"older version"
    assert left_overs(folder) == set()


def test_complete_file_in_a_read_only_folder_is_fine(entry_of: Build, folder: Path, env: Env, content: bytes) -> None:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(content)
    folder.chmod(0o555)
    assert outcome(start(entry_of("http://127.0.0.1:1/x"), folder, env, drop=True)).strip() == "None"
    assert left_overs(folder) == set()


def test_folder_that_is_a_file(entry_of: Build, folder: Path, env: Env, refused: str) -> None:
    folder.write_text("not a folder")
    with pytest.raises(PullError, match=r"models: File exists|models.*Not a directory"):
        pull(entry_of(refused), folder, env=env)


def test_killed_pull_is_resumed_and_its_lock_is_gone(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    process = start(entry_of(server.url("paused")), folder, env)
    assert server.half_sent.wait(30)
    partial = folder / "tiny.gguf.partial"
    while not partial.exists() or partial.stat().st_size < len(content) // 2:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    outcome(process)
    assert not (folder / "tiny.gguf").exists()
    result = pull(entry_of(server.url("honest")), folder, env=env)
    assert server.ranges[-1] == ("/honest", f"bytes={len(content) // 2}-")
    assert result.path.read_bytes() == content
    assert left_overs(folder) == set()


def test_two_pulls_at_once(server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes) -> None:
    first = start(entry_of(server.url("paused")), folder, env)
    assert server.half_sent.wait(30)
    with pytest.raises(PullLocked, match=f"process {first.pid} is working on tiny.gguf"):
        pull(entry_of(server.url("honest")), folder, env=env)
    server.go_on.set()
    assert outcome(first).strip() == server.url("paused")
    assert (folder / "tiny.gguf").read_bytes() == content
    assert pull(entry_of(server.url("honest")), folder, env=env).source is None
    assert server.ranges == [("/paused", None)]


def test_lock_file_left_by_a_dead_process_is_no_obstacle(
    server: FileServer, entry_of: Build, folder: Path, env: Env
) -> None:
    folder.mkdir()
    lock = folder / "tiny.gguf.lock"
    lock.write_text("1")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PullLocked, match="process 1 is working"):
            pull(entry_of(server.url("honest")), folder, env=env)
    pull(entry_of(server.url("honest")), folder, env=env)
    assert left_overs(folder) == set()


@pytest.mark.parametrize("name", ["../up.gguf", "/tmp/up.gguf", ".."])
def test_path_traversal_is_refused_before_anything_is_touched(
    entry_of: Build, folder: Path, env: Env, refused: str, name: str
) -> None:
    with pytest.raises(UnsafePath):
        pull(entry_of(refused, file=name), folder, env=env)
    assert not folder.exists()


def test_interrupted_by_the_user_keeps_what_came(
    server: FileServer, entry_of: Build, folder: Path, env: Env, content: bytes
) -> None:
    def stop(source: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(entry_of(server.url("honest")), folder, env=env, progress=stop)
    assert left_overs(folder) == {"tiny.gguf.partial"}
    assert os.path.getsize(folder / "tiny.gguf.partial") > 0
