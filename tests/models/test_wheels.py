from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from models.catalog import Entry, Wheels
from models.pull import pull
from protocol.errors import DiskFull, HashMismatch, SourceUnreachable, UnsafePath

Build = Callable[..., Entry]
Env = dict[str, str]


def wheel(links: Path, number: int, members: dict[str, bytes]) -> None:
    """A wheel `tiny-part<number>` 1.0 in the folder `links`."""
    links.mkdir(exist_ok=True)
    info = f"tiny_part{number}-1.0.dist-info"
    with zipfile.ZipFile(links / f"tiny_part{number}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def source(*numbers: int) -> Wheels:
    return Wheels([f"tiny-part{number}==1.0" for number in numbers], "*/data/part*.bin")


@pytest.fixture
def links(tmp_path: Path, env: Env) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "links"
    env["PIP_FIND_LINKS"] = str(folder)
    return folder


def test_members_are_joined_in_numeric_order(links: Path, entry_of: Build, folder: Path, env: Env) -> None:
    # Two wheels that hold several parts each, so that neither the wheels' nor the members' text order is right.
    for number, parts in ((10, (11, 10)), (2, (2, 1))):
        wheel(links, number, {f"tiny/data/part{part}.bin": b"%d;" % part for part in parts})
    result = pull(entry_of(source(10, 2), content=b"1;2;10;11;"), folder, env=env)
    assert result.path.read_bytes() == b"1;2;10;11;"
    assert result.source == "tiny-part10==1.0 and 1 more"
    assert {path.name for path in folder.iterdir()} == {"tiny.gguf", "tiny.gguf.sha256.json"}


def test_missing_wheel_is_named_and_finished_ones_are_kept(
    links: Path, entry_of: Build, folder: Path, env: Env
) -> None:
    wheel(links, 1, {"tiny/data/part1.bin": b"one"})
    entry = entry_of(source(1, 2), content=b"onetwo")
    with pytest.raises(SourceUnreachable, match=r"tiny-part3==1\.0"):
        pull(entry_of(source(3)), folder, env=env)
    assert list(folder.iterdir()) == []
    with pytest.raises(SourceUnreachable, match=r"pip could not fetch tiny-part2==1\.0: No matching distribution"):
        pull(entry, folder, env=env)
    # The first is not asked for again: it is no longer to be had.
    (links / "tiny_part1-1.0-py3-none-any.whl").unlink()
    wheel(links, 2, {"tiny/data/part2.bin": b"two"})
    assert pull(entry, folder, env=env).path.read_bytes() == b"onetwo"


@pytest.mark.parametrize("name", ["../data/part1.bin", "/abs/data/part1.bin", "x/../../data/part1.bin"])
def test_member_that_points_outside_is_refused(
    links: Path, entry_of: Build, folder: Path, env: Env, tmp_path: Path, name: str
) -> None:
    wheel(links, 1, {name: b"evil"})
    with pytest.raises(UnsafePath, match="points outside its folder"):
        pull(entry_of(source(1), content=b"evil"), folder, env=env)
    assert list(tmp_path.rglob("*.bin")) == []
    assert list(folder.iterdir()) == []


def test_wrong_content_is_not_kept(links: Path, entry_of: Build, folder: Path, env: Env) -> None:
    wheel(links, 1, {"tiny/data/part1.bin": b"bad"})
    entry = entry_of(source(1), content=b"abc")
    with pytest.raises(HashMismatch, match="has another content"):
        pull(entry, folder, env=env)
    assert list(folder.iterdir()) == []
    wheel(links, 1, {"tiny/data/part1.bin": b"abc"})
    assert pull(entry, folder, env=env).path.read_bytes() == b"abc"


def test_truncated_bomb_and_empty(links: Path, entry_of: Build, folder: Path, env: Env) -> None:
    entry = entry_of(source(1), content=b"abcdef")
    wheel(links, 1, {"tiny/data/part1.bin": b"abc"})
    with pytest.raises(HashMismatch, match="is truncated: 3 of 6 bytes"):
        pull(entry, folder, env=env)
    wheel(links, 1, {"tiny/data/part1.bin": bytes(50_000_000)})  # 50 kB as an archive
    with pytest.raises(HashMismatch, match="sends more than the 6 bytes"):
        pull(entry, folder, env=env)
    wheel(links, 1, {"tiny/readme.txt": b"abcdef"})
    with pytest.raises(HashMismatch, match=r"has no member \*/data/part\*\.bin in tiny_part1"):
        pull(entry, folder, env=env)
    assert list(folder.iterdir()) == []


def test_room_for_wheels_and_file_is_asked_for(links: Path, entry_of: Build, folder: Path, env: Env) -> None:
    wheel(links, 1, {"tiny/data/part1.bin": bytes(4_000_000)})
    entry = entry_of(source(1), content=bytes(4_000_000))
    with pytest.raises(DiskFull, match=r"needs 24\.8 MB"):
        pull(entry, folder, env=env, free_space=lambda _: 24_000_000)


def test_killed_between_two_wheels_goes_on_with_the_next(
    links: Path, entry_of: Build, folder: Path, env: Env, tmp_path: Path
) -> None:
    """The second wheel is a pipe that nobody writes to: pip waits on it until the pull is killed."""
    wheel(links, 1, {"tiny/data/part1.bin": b"one"})
    os.mkfifo(links / "tiny_part2-1.0-py3-none-any.whl")
    entry = entry_of(source(1, 2), content=b"onetwo")
    child = (
        "import json, os, sys, msgspec\nfrom pathlib import Path\nfrom models.catalog import Entry\n"
        "from models.pull import pull\nfields, folder = json.loads(sys.argv[1])\n"
        "pull(msgspec.convert(fields, Entry), Path(folder), env=os.environ)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", child, json.dumps([msgspec.to_builtins(entry), str(folder)])],
        env=env | {"PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    )
    # Opening for writing returns as soon as pip has opened the pipe for reading, which is after the first wheel.
    with (links / "tiny_part2-1.0-py3-none-any.whl").open("wb"):
        os.killpg(process.pid, signal.SIGKILL)  # pip with it, as when the power goes
        process.wait()
    for path in links.iterdir():
        path.unlink()
    wheel(links, 2, {"tiny/data/part2.bin": b"two"})
    assert pull(entry, folder, env=env).path.read_bytes() == b"onetwo"
    assert {path.name for path in folder.iterdir()} == {"tiny.gguf", "tiny.gguf.sha256.json"}
