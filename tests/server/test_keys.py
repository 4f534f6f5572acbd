"""API keys: shown once, kept as hashes, revoked while the server runs."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from protocol.errors import AuthError, ConfigError
from server.cloud.keys import PREFIX, KeyFile, Keys


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "folder" / "keys.json")


def test_a_key_is_random_and_only_its_hash_is_kept(file: KeyFile) -> None:
    one, two = file.add("one"), file.add("two")
    assert one.startswith(PREFIX)
    assert len(one) >= len(PREFIX) + 43  # 256 bits in base64
    assert one != two
    content = file.path.read_text()
    assert one not in content
    assert one.removeprefix(PREFIX) not in content
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [path.name for path in file.path.parent.iterdir()] == ["keys.json"]
    assert [key.name for key in file.entries()] == ["one", "two"]


def test_a_name_is_given_once(file: KeyFile) -> None:
    file.add("one")
    with pytest.raises(ConfigError, match="'one'"):
        file.add("one")


def test_an_unknown_name_cannot_be_revoked(file: KeyFile) -> None:
    file.add("one")
    with pytest.raises(AuthError, match="'two'"):
        file.revoke("two")


def test_a_running_server_sees_changes(file: KeyFile) -> None:
    keys = Keys(file.path)
    assert keys.check(None) is None
    secret = file.add("one")
    key = keys.check(secret)
    assert key is not None
    assert key.name == "one"
    assert keys.holds(key)
    assert not keys.holds(None)
    for wrong in (None, "", secret + "x", PREFIX, "ü\udc80"):
        with pytest.raises(AuthError):
            keys.check(wrong)
    file.revoke("one")
    assert not keys.holds(key)
    with pytest.raises(AuthError):
        keys.check(secret)


def test_a_name_that_is_given_anew_is_another_key(file: KeyFile) -> None:
    keys = Keys(file.path)
    key = keys.check(file.add("one"))
    file.revoke("one")
    file.add("one")
    assert not keys.holds(key)


def test_losing_the_last_key_opens_nothing(file: KeyFile) -> None:
    file.add("one")
    keys = Keys(file.path)
    file.revoke("one")
    with pytest.raises(AuthError):
        keys.check(None)
    file.path.unlink()
    with pytest.raises(AuthError):
        keys.check(None)


def test_a_damaged_file_stops_the_start_and_opens_nothing_later(file: KeyFile) -> None:
    secret = file.add("one")
    keys = Keys(file.path)
    file.path.write_text("{broken")
    with pytest.raises(AuthError):
        keys.check(secret)
    with pytest.raises(ConfigError, match="not a key file"):
        Keys(file.path)
    with pytest.raises(ConfigError):
        file.add("two")
    assert file.path.read_text() == "{broken"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        KeyFile(tmp_path / "taken" / "keys.json").add("one")
