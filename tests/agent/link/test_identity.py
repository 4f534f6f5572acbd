from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec

from agent.link.identity import identity
from protocol.errors import StoreError
from protocol.signing import verify


def test_the_key_is_made_once_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "device.pem"
    made = identity(path)
    assert len(made.public) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert identity(path).public == made.public
    assert list(path.parent.iterdir()) == [path]


def test_two_that_make_it_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "device.pem"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(identity(path).public)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {identity(path).public}
    assert len(found) == 8


def test_signatures_are_checked(tmp_path: Path) -> None:
    one, other = identity(tmp_path / "1"), identity(tmp_path / "2")
    signature = one.sign(b"data")
    assert len(signature) == 64
    assert verify(one.public, signature, b"data")
    assert not verify(other.public, signature, b"data")
    assert not verify(one.public, signature, b"date")
    assert not verify(one.public, signature[:-1], b"data")
    assert not verify(one.public[:-1], signature, b"data")
    assert not verify(b"\xff" * 32, signature, b"data")


def elliptic() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


@pytest.mark.parametrize("content", [b"", b"\0\xff", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", elliptic()])
def test_a_damaged_key_is_told_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "device.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="restore it from a backup"):
        identity(path)
    assert path.read_bytes() == content


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.pem"
    identity(path)
    path.chmod(0o640)
    with pytest.raises(StoreError, match="chmod 600"):
        identity(path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be read or made"):
        identity(tmp_path / "file" / "device.pem")
