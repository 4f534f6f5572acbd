from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from models.fingerprint import files_in, fingerprint, fingerprint_of_parts, measure, recall, remember, size_of


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    for name in ("b", "a", "sub/c", "manifest.json", ".hidden"):
        (model / name).write_bytes(name.encode())
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_bytes(b"x")
    return model


def test_folder_is_the_hash_of_a_sorted_list(model: Path) -> None:
    text = f"{sha(b'a')}  a\n{sha(b'b')}  b\n{sha(b'sub/c')}  sub/c\n"
    assert fingerprint(model) == sha(text.encode())
    assert fingerprint_of_parts([(name, sha(name.encode())) for name in ("sub/c", "manifest.json", "b", "a")]) == (
        fingerprint(model)
    )
    assert files_in(model) == ["a", "b", "manifest.json", "sub/c"]
    assert size_of(model) == sum(len(name) for name in ("a", "b", "manifest.json", "sub/c"))
    (model / "sub" / "manifest.json").write_bytes(b"this one counts")
    assert fingerprint(model) != sha(text.encode())


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def swap_times(model: Path) -> None:
    """Every sum and every maximum over the files stays the same."""
    first, second = (model / "a").stat().st_mtime_ns, (model / "b").stat().st_mtime_ns
    os.utime(model / "a", ns=(second, second))
    os.utime(model / "b", ns=(first, first))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: touch(model / "a"),
        lambda model: touch(model / "sub" / "c"),
        lambda model: (model / "new").write_bytes(b""),
        lambda model: (model / "b").unlink(),
        lambda model: (model / "a").rename(model / "d"),
        lambda model: (model / "sub").rename(model / "bus"),
        swap_times,
    ],
)
def test_any_change_of_any_file_is_noticed(model: Path, change: Callable[[Path], object]) -> None:
    os.utime(model / "a", ns=(1, 1))
    remember(model, "0" * 64)
    assert fingerprint(model) == "0" * 64, "the sidecar answers, nothing is read"
    change(model)
    assert recall(model) is None
    assert fingerprint(model) != "0" * 64


def test_hidden_files_change_nothing(model: Path) -> None:
    before = measure(model)
    (model / ".hidden").unlink()
    (model / ".new").write_bytes(b"x")
    assert recall(model) == before


def test_sidecar_of_a_file_says_nothing_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"abc")
    measure(path)
    path.unlink()
    path.mkdir()
    assert recall(path) is None
    measure(path)
    path.rmdir()
    path.write_bytes(b"abc")
    assert recall(path) is None


def test_links_that_stay_inside_are_followed(model: Path) -> None:
    (model / "link").symlink_to("sub/c")
    assert files_in(model) == ["a", "b", "link", "manifest.json", "sub/c"]
    before = measure(model)
    (model / "sub" / "c").write_bytes(b"changed")
    assert measure(model) != before


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "missing", "link", "sub", "."])
def test_links_that_leave_or_lead_nowhere_are_refused(model: Path, target: str) -> None:
    (model.parent / "secret").write_bytes(b"secret")
    (model / "link").symlink_to(target)
    for question in (fingerprint, measure, recall, size_of):
        with pytest.raises(OSError, match="the link link leaves the folder or leads to a folder"):
            question(model)


def test_name_that_could_forge_a_line_is_refused(model: Path) -> None:
    (model / "x\nffff  y").write_bytes(b"")
    with pytest.raises(OSError, match=r"name cannot be printed: 'x\\nffff  y'"):
        fingerprint(model)


def test_model_reached_by_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(model)
    assert fingerprint(tmp_path / "alias") == fingerprint(model)


def test_what_is_no_file_is_left_out(model: Path) -> None:
    before = measure(model)
    os.mkfifo(model / "pipe")
    assert measure(model) == before


def test_missing_folder(tmp_path: Path) -> None:
    for question in (fingerprint, measure, recall, size_of):
        with pytest.raises(FileNotFoundError):
            question(tmp_path / "missing")
