"""Fetching agreed adapters from a server that damages and breaks off."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent.adapt.blobs import fetch, upload
from models.download import Timeouts
from protocol.adapters import Blob
from protocol.errors import LinkError, PullError

RAW = bytes(range(256)) * 4000
BLOB = Blob(hashlib.sha256(RAW).hexdigest(), len(RAW))
SOON = Timeouts(connect=5.0, read=5.0)


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/adapters"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, raw: bytes, cut: int | None = None) -> None:
    """`raw` from where the request wants it; `cut`: the connection ends after so many bytes."""
    first = int(handler.headers.get("Range", "bytes=0-")[6:-1])
    handler.send_response(206 if first else 200)
    if first:
        handler.send_header("Content-Range", f"bytes {first}-{len(raw) - 1}/{len(raw)}")
    handler.send_header("Content-Length", str(len(raw) - first))
    handler.end_headers()
    handler.wfile.write(raw[first:][:cut])


def test_what_is_damaged_on_the_way_is_never_there(tmp_path: Path) -> None:
    damaged = bytearray(RAW)
    damaged[len(RAW) // 2] ^= 1
    came: list[int] = []
    with serving(lambda handler: send(handler, bytes(damaged))) as url, pytest.raises(PullError):
        fetch(url, BLOB, tmp_path, came.append, SOON)
    assert list(tmp_path.iterdir()) == []
    with serving(lambda handler: send(handler, RAW)) as url:
        path = fetch(url, BLOB, tmp_path, came.append, SOON)
    assert path.read_bytes() == RAW
    assert sum(came) == 2 * len(RAW)


def test_what_broke_off_goes_on(tmp_path: Path) -> None:
    came: list[int] = []
    with serving(lambda handler: send(handler, RAW, 300_000)) as url:
        assert fetch(url, BLOB, tmp_path, came.append, SOON).read_bytes() == RAW
    assert sum(came) == len(RAW)


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / f"{BLOB.id}.gguf").write_bytes(RAW)
    assert fetch("http://127.0.0.1:1", BLOB, tmp_path, lambda count: None, SOON).read_bytes() == RAW


@pytest.mark.parametrize("size", [len(RAW) - 1, len(RAW) + 1])
def test_another_length_is_refused_unread(tmp_path: Path, size: int) -> None:
    came: list[int] = []
    with serving(lambda handler: send(handler, (RAW + b"x")[:size])) as url, pytest.raises(PullError):
        fetch(url, BLOB, tmp_path, came.append, SOON)
    assert came == []


def nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/9.9 what\r\n\r\n")


def test_a_server_that_makes_no_sense_is_a_link_that_failed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(RAW)
    for url in ("http://127.0.0.1:1/v1", "http://[::1]:1/v1"):
        with pytest.raises(LinkError):
            upload(url, BLOB.id, tmp_path / "a", lambda count: None, lambda: False, SOON)
    with serving(nonsense) as url, pytest.raises(LinkError):
        upload(url, BLOB.id, tmp_path / "a", lambda count: None, lambda: False, SOON)
