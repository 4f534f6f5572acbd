"""A real HTTP server on loopback that can be told to misbehave, and entries whose content it serves."""

from __future__ import annotations

import hashlib
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from models.catalog import Entry, Part, Source, Url
from models.fingerprint import fingerprint_of_parts

CONTENT = random.Random(7).randbytes(1_000_003)


class FileServer(ThreadingHTTPServer):
    """Serves `content` at /honest and each of `files` below it; every other path names one way to misbehave.
    Records each request's Range."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.files: dict[str, bytes] = {}
        self.ranges: list[tuple[str, str | None]] = []
        self.half_sent = threading.Event()
        self.go_on = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that is killed or gives up is what these tests are about


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    @property
    def content(self) -> bytes:
        """That of the file of a folder which the path ends in, else the one content."""
        files = self.server.files.items()
        return next((content for name, content in files if self.path.endswith(f"/{name}")), self.server.content)

    def do_GET(self) -> None:
        self.server.ranges.append((self.path, self.headers.get("Range")))
        kind = self.path.lstrip("/").split("/")[0]
        getattr(self, f"serve_{kind}", self.serve_missing)()

    def serve_honest(self) -> None:
        self._send(self.content, start=self._asked())

    serve_me = serve_honest  # the hub's layout: /me/repository/resolve/main/file

    def serve_rangeless(self) -> None:
        self._send(self.content, start=None)

    def serve_lie(self) -> None:
        self._send(bytes(len(self.content)), start=self._asked())

    def serve_short(self) -> None:
        self._send(self.content[:-1], start=self._asked())

    def serve_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(3):
            self.wfile.write(self.content)

    def serve_redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.server.url("honest"))
        self.end_headers()

    def serve_breaking(self) -> None:
        """Announces all of it, sends a third of what is left and hangs up."""
        start = self._asked() or 0
        self._head(len(self.content), start or None)
        self.wfile.write(self.content[start : start + (len(self.content) - start) // 3 + 1])

    def serve_broken(self) -> None:
        """Like breaking, but never gets beyond the first thousand bytes."""
        start = self._asked() or 0
        self._head(len(self.content), start or None)
        self.wfile.write(self.content[start:1000])

    def serve_paused(self) -> None:
        """Sends half and waits until it is told to go on. What is small is not worth it."""
        if len(self.content) < 1000:
            self.serve_honest()
            return
        start = self._asked() or 0
        half = max(start, len(self.content) // 2)
        self._head(len(self.content), start or None)
        self.wfile.write(self.content[start:half])
        self.wfile.flush()
        self.server.half_sent.set()
        self.server.go_on.wait()
        self.wfile.write(self.content[half:])

    def serve_missing(self) -> None:
        self.send_error(404)

    def _asked(self) -> int | None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(asked[1]) if asked else None

    def _send(self, content: bytes, start: int | None) -> None:
        if start is not None and start >= len(content):
            self.send_error(416)
            return
        self._head(len(content), start)
        self.wfile.write(content[start or 0 :])

    def _head(self, total: int, start: int | None) -> None:
        self.send_response(200 if start is None else 206)
        self.send_header("Content-Length", str(total - (start or 0)))
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer(CONTENT)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/file"


@pytest.fixture
def refused() -> str:
    """A URL on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/file"


@pytest.fixture
def env() -> dict[str, str]:
    """An environment in which pip reaches no index."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return kept | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "no_proxy": "127.0.0.1"}


@pytest.fixture
def content() -> bytes:
    return CONTENT


@pytest.fixture
def entry_of() -> Callable[..., Entry]:
    """Builds an entry with these sources (text is a URL) for CONTENT, or for the `content` that is given."""

    def build(*sources: Source | str, content: bytes = CONTENT, file: str = "tiny.gguf") -> Entry:
        return Entry(
            id="tiny",
            name="Tiny",
            file=file,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            licence="Apache-2.0",
            architecture="llama",
            quantisation="Q4_0",
            context=128,
            sources=[Url(source) if isinstance(source, str) else source for source in sources],
        )

    return build


@pytest.fixture
def folder_entry() -> Callable[..., Entry]:
    """Builds an entry for a folder with these files (path: content) and these sources (text is a URL)."""

    def build(files: dict[str, bytes], *sources: Source | str, **fields: Any) -> Entry:
        parts = [Part(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in files.items()]
        given: dict[str, Any] = {
            "size": sum(part.size for part in parts),
            "sha256": fingerprint_of_parts((part.path, part.sha256) for part in parts),
            "files": parts,
            "sources": [Url(source) if isinstance(source, str) else source for source in sources],
        }
        common = {"name": "Tiny", "licence": "MIT", "architecture": "llama", "quantisation": "int4", "context": 128}
        return Entry(**{"id": "tiny", "file": "tiny", **common, **given, **fields})

    return build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"
