"""What an edge does with uploads that are broken off, broken, too slow or not wanted; over real HTTP."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from agent.adapt.blobs import NotOffered, Refused, fetch, upload
from models.adapter import write
from protocol.adapters import Blob
from protocol.errors import LinkError, PullError
from server.edge.blobs import BlobLimits
from tests.agent.peers.devices import eventually
from tests.server.edge.adapter_fleet import Fleet, adapter, offer_of

RAW = b"never parsed " * 100
LIMITS = BlobLimits(uploads=2, silence_s=0.4, longest_s=30.0)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as made:
        made.edge(limits=LIMITS)
        made.called(1)
        yield made


def url(fleet: Fleet) -> str:
    assert fleet.rounds is not None
    return fleet.rounds.url


def id_of(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def asked(
    fleet: Fleet, method: str, id: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, str, Mapping[str, str]]:
    """Status, what it says, headers."""
    parts = urlsplit(url(fleet))
    with closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)) as connection:
        connection.request(method, f"{parts.path}/{id}", body, dict(headers or {}))
        answer = connection.getresponse()
        said = answer.read()
        text = json.loads(said).get("error", {}).get("message", "") if said else ""
        return answer.status, text, answer.headers


def offered(fleet: Fleet, raw: bytes, name: str = "d", **values: object) -> str:
    """The hash, which the edge now expects."""
    fleet.offer(name, offer_of(raw, 1, **values))
    eventually(lambda: asked(fleet, "HEAD", id_of(raw))[0] != 404)
    return id_of(raw)


def good(tmp_path: Path, seed: int = 1) -> tuple[Path, bytes]:
    path = tmp_path / f"{seed}.gguf"
    write(adapter(seed), path)
    return path, path.read_bytes()


def uploaded(fleet: Fleet) -> int:
    return fleet.look().uploaded


def nothing(count: int) -> None: ...


def test_an_upload_that_broke_off_goes_on_where_it_was(fleet: Fleet, tmp_path: Path) -> None:
    path, raw = good(tmp_path)
    id = offered(fleet, raw)
    parts = urlsplit(url(fleet))
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as cut:
        head = f"PUT {parts.path}/{id} HTTP/1.1\r\nHost: edge\r\nContent-Length: {len(raw)}\r\n\r\n"
        cut.sendall(head.encode() + raw[:1000])
        eventually(lambda: asked(fleet, "HEAD", id)[2]["Upload-Offset"] == "1000")
        sent: list[int] = []
        upload(url(fleet), id, path, sent.append, lambda: False)  # while the first connection is still open
    assert sum(sent) == len(raw) - 1000
    assert uploaded(fleet) == 1
    upload(url(fleet), id, path, sent.append, lambda: False)  # once more, for the answer was lost, say
    assert sum(sent) == len(raw) - 1000


def test_whoever_offers_nothing_can_leave_nothing(fleet: Fleet) -> None:
    status, said, _ = asked(fleet, "PUT", id_of(RAW), RAW)
    assert (status, "nobody has offered" in said) == (404, True)
    assert asked(fleet, "PUT", "..%2F..%2Fetc%2Fpasswd", RAW)[0] == 404
    assert list((fleet.folder / "adapters" / "incoming").iterdir()) == []


def test_no_more_is_taken_than_was_offered(fleet: Fleet) -> None:
    id = offered(fleet, RAW)
    assert asked(fleet, "PUT", id, RAW + b"x")[0] == 413
    assert asked(fleet, "PUT", id, RAW, {"Content-Range": f"bytes 0-{len(RAW)}/{len(RAW) + 1}"})[0] == 413
    status, _, headers = asked(fleet, "PUT", id, RAW[5:], {"Content-Range": f"bytes 5-{len(RAW) - 1}/{len(RAW)}"})
    assert (status, headers["Upload-Offset"]) == (409, "0")
    parts = urlsplit(url(fleet))
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as endless:  # of no length at all
        endless.sendall(f"PUT {parts.path}/{id} HTTP/1.1\r\nHost: e\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        endless.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
        assert b" 422 " in endless.makefile("rb").readline()
    assert uploaded(fleet) == 0


def test_what_has_another_hash_is_dropped_and_can_be_sent_anew(fleet: Fleet, tmp_path: Path) -> None:
    path, raw = good(tmp_path)
    id = offered(fleet, raw)
    status, said, _ = asked(fleet, "PUT", id, bytes(len(raw)))
    assert (status, "another content" in said) == (422, True)
    assert asked(fleet, "HEAD", id)[2]["Upload-Offset"] == "0"
    upload(url(fleet), id, path, nothing, lambda: False)
    assert uploaded(fleet) == 1


def hostile(tmp_path: Path, what: str) -> bytes:
    path, raw = good(tmp_path)
    if what == "no adapter":
        return RAW
    if what == "truncated":
        return raw[:-100]
    if what == "not a number":
        return raw[:-64] + np.full(32, np.nan, np.float16).tobytes()
    write(adapter(1, model="cd" * 32) if what == "another model" else adapter(1, rank=7), path)
    return path.read_bytes()


@pytest.mark.parametrize("what", ["no adapter", "truncated", "not a number", "another model", "another rank"])
def test_a_hostile_file_is_dropped_and_its_sender_counted(fleet: Fleet, tmp_path: Path, what: str) -> None:
    raw = hostile(tmp_path, what)
    id = offered(fleet, raw, "mallory")
    status, said, _ = asked(fleet, "PUT", id, raw)
    assert status == 422
    assert said
    status, said, _ = asked(fleet, "PUT", id, raw)
    assert (status, "(broken)" in said) == (403, True)
    eventually(lambda: fleet.look().refusals == {"mallory": {"broken": 1}})
    assert uploaded(fleet) == 0
    assert list((fleet.folder / "adapters" / "incoming").iterdir()) == []


def test_what_others_upload_cannot_be_fetched_or_claimed(fleet: Fleet, tmp_path: Path) -> None:
    path, raw = good(tmp_path)
    id = offered(fleet, raw, "alice")
    upload(url(fleet), id, path, nothing, lambda: False)
    assert asked(fleet, "GET", id)[0] == 404
    (stolen := tmp_path / "stolen").mkdir()
    with pytest.raises(PullError):
        fetch(url(fleet), Blob(id, len(raw)), stolen, nothing)
    fleet.offer("mallory", offer_of(raw, 1, lessons=10**6))
    eventually(lambda: fleet.look().refusals == {"mallory": {"copied": 1}})
    assert fleet.look().offered == 1


def test_a_second_adapter_in_a_round_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    _, raw = good(tmp_path, 1)
    path, other = good(tmp_path, 2)
    offered(fleet, raw)
    fleet.offer("d", offer_of(other, 1))
    eventually(lambda: fleet.look().refusals == {"d": {"duplicate": 1}})
    with pytest.raises(Refused):
        upload(url(fleet), id_of(other), path, nothing, lambda: False)


def test_what_nobody_offered_yet_is_tried_again(fleet: Fleet, tmp_path: Path) -> None:
    path, raw = good(tmp_path)
    with pytest.raises(NotOffered):
        upload(url(fleet), id_of(raw), path, nothing, lambda: False)


def test_who_sends_nothing_loses_the_connection(fleet: Fleet) -> None:
    """Neither a request that never ends nor an upload that falls silent keeps others waiting."""
    id = offered(fleet, RAW)
    parts = urlsplit(url(fleet))
    where = (parts.hostname or "", parts.port or 0)
    with socket.create_connection(where) as slow, socket.create_connection(where) as silent:
        slow.sendall(b"GET /v1/adapters/")
        silent.sendall(f"PUT {parts.path}/{id} HTTP/1.1\r\nHost: e\r\nContent-Length: {len(RAW)}\r\n\r\nsome".encode())
        for each in (slow, silent):
            each.settimeout(30)
        assert b" 408 " in silent.makefile("rb").readline()
        assert slow.recv(1) == b""
    assert asked(fleet, "HEAD", id)[2]["Upload-Offset"] == "4"


def test_only_so_many_upload_at_once(fleet: Fleet, tmp_path: Path) -> None:
    parts = urlsplit(url(fleet))
    held = []
    for seed in range(LIMITS.uploads):
        raw = RAW + bytes([seed])
        id = offered(fleet, raw, f"d{seed}")
        connection = socket.create_connection((parts.hostname or "", parts.port or 0))
        connection.sendall(
            f"PUT {parts.path}/{id} HTTP/1.1\r\nHost: e\r\nContent-Length: {len(raw)}\r\n\r\n12".encode()
        )
        eventually(lambda id=id: asked(fleet, "HEAD", id)[2]["Upload-Offset"] == "2")  # type: ignore[misc]
        held.append(connection)
    path, raw = good(tmp_path)
    id = offered(fleet, raw, "late")
    with pytest.raises(LinkError, match="429"):
        upload(url(fleet), id, path, nothing, lambda: False)
    for connection in held:
        connection.close()

    def done() -> bool:
        try:
            upload(url(fleet), id, path, nothing, lambda: False)
        except LinkError:
            return False
        return True

    eventually(done)
