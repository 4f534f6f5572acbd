"""Adapters over HTTP, by the SHA-256 of their files (docs/mqtt.md says what is announced):

    PUT  /v1/adapters/<id>    what a device has offered in this round; with Content-Range from where it was cut off
    HEAD /v1/adapters/<id>    how much of it is there (Upload-Offset), all of it (Upload-Complete: ?1); or an agreed one
    GET  /v1/adapters/<id>    an agreed one; Range works. Nobody can fetch what a device has uploaded

Whoever knows a hash may upload what belongs to it, and nothing else: hashes of uploads are known to device and edge
alone. A file is on the disk, and whole, before its upload is answered with 201. Every answer to a refused upload says
why, as {"error": {"message"}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aiohttp import ClientError, hdrs, web
from aiohttp.abc import AbstractStreamWriter

from models.partial import Partial, partial_path
from protocol.adapters import SHA256
from protocol.errors import BadAdapter, ConfigError, DiskFull, HashMismatch, PullError

log = logging.getLogger(__name__)

PATH = "/v1/adapters"
OFFSET, COMPLETE = "Upload-Offset", "Upload-Complete"  # as draft-ietf-httpbis-resumable-upload calls them
_ID = re.compile(SHA256)
_RANGE = re.compile(r"bytes (\d{1,12})-(\d{1,12})/(\d{1,12})")
_SWEEP_S = 1.0
_RETRY_S = 1


@dataclass(frozen=True, slots=True)
class BlobLimits:
    """`uploads`, `downloads`: at once. `silence_s`: without a byte, and of a connection without a request; `longest_s`:
    of one request, after which it is taken up again."""

    uploads: int = 8
    downloads: int = 32
    connections: int = 256
    silence_s: float = 15.0
    longest_s: float = 120.0


class Expected(Protocol):
    """What the edge waits for."""

    @property
    def bytes(self) -> int: ...


class Desk(Protocol):
    """Decides what may come and go. Called on threads of the server; waits for the disk."""

    def expects(self, id: str) -> Expected | str:
        """What was offered under this hash; or the reason to refuse it, in words. Raises LookupError if nobody has
        offered it."""

    def is_here(self, id: str) -> bool:
        """It was uploaded already in this round."""

    def incoming(self, id: str) -> Path:
        """Where an upload goes."""

    def took(self, id: str) -> None:
        """It is whole and in its place. Raises BadAdapter if it is of no use."""

    def blob(self, id: str) -> Path | None:
        """The file of an agreed adapter."""


class BlobServer:
    """Listens from `start` to `close`, on a thread of its own. `bytes_up`, `bytes_down`: of the files, not counting
    headers."""

    def __init__(self, desk: Desk, host: str, port: int, limits: BlobLimits | None = None) -> None:
        self.bytes_up = 0
        self.bytes_down = 0
        self.port = port
        self._desk = desk
        self._host = host
        self._limits = limits or BlobLimits()
        self._uploading: dict[str, tuple[web.RequestHandler, asyncio.Event]] = {}
        self._downloads = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._wrong: ConfigError | None = None
        self._thread = threading.Thread(target=self._run, name="blobs", daemon=True)

    def start(self) -> None:
        """Raises ConfigError if it cannot listen there."""
        if not is_loopback(self._host):
            log.warning(
                "adapters.host = %s: adapters cross the network as they are; put a server that speaks TLS before it, "
                "and name it in adapters.url",
                self._host,
            )
        self._thread.start()
        self._ready.wait()
        if self._wrong is not None:
            self._thread.join()
            raise self._wrong

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        app = web.Application()
        guard = _Guard(self._limits)
        app.middlewares.append(guard.middleware)
        app.add_routes([web.put(f"{PATH}/{{id}}", self._put), web.get(f"{PATH}/{{id}}", self._get)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, keepalive_timeout=self._limits.silence_s)
        try:
            await runner.setup()
            await web.TCPSite(runner, self._host, self.port).start()
            self.port = runner.addresses[0][1]
        except OSError as error:
            self._wrong = ConfigError(
                f"cannot listen on {self._host}:{self.port}: {error.strerror}; choose another adapters.port"
            )
        self._ready.set()
        try:
            while self._wrong is None and not self._stop.is_set():
                guard.sweep(runner.server)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), _SWEEP_S)
        finally:
            await runner.cleanup()

    # Up

    async def _put(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if not _ID.match(id):
            return _refused(404, "an adapter is named by its SHA-256, 64 hex digits")
        try:
            wanted = await asyncio.to_thread(self._desk.expects, id)
        except LookupError:
            return _refused(404, "nobody has offered this adapter in this round: offer it first")
        if isinstance(wanted, str):
            return _refused(403, wanted)
        if await asyncio.to_thread(self._desk.is_here, id):
            return web.json_response({"id": id})
        await self._take_over(id)
        if id in self._uploading or len(self._uploading) >= self._limits.uploads:
            return _later("too many uploads at once")
        self._uploading[id] = request.protocol, asyncio.Event()
        try:
            return await self._receive(request, id, wanted.bytes)
        except BadAdapter as error:
            return _refused(422, str(error))
        except HashMismatch as error:
            return _refused(422, f"what came {error}: it was dropped, send it anew")
        except DiskFull:
            log.error("an upload of %d bytes does not fit on the disk", wanted.bytes)
            return _refused(507, "the edge's disk is full: try again later")
        except (PullError, OSError) as error:
            log.error("an upload could not be kept: %s", error)
            return _refused(500, "the edge cannot keep it: try again later")
        finally:
            self._uploading.pop(id)[1].set()

    async def _take_over(self, id: str) -> None:
        """An upload of the same file is the same device's, which has been cut off from it and may not know yet."""
        if before := self._uploading.get(id):
            connection, ended = before
            connection.force_close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _RETRY_S)

    async def _receive(self, request: web.Request, id: str, size: int) -> web.Response:
        """Raises HashMismatch, DiskFull, PullError, BadAdapter."""
        destination = self._desk.incoming(id)
        partial = await asyncio.to_thread(Partial, destination, size)
        with partial:
            if wrong := _misplaced(request, partial, size):
                return wrong
            if await self._filled(request, partial, size):
                with _gone_if_wrong(partial):
                    partial.check(id)
                    await asyncio.to_thread(partial.publish)
                    await asyncio.to_thread(self._desk.took, id)
                return web.json_response({"id": id}, status=201)
            return _refused(408, "it broke off: go on at Upload-Offset", **{OFFSET: str(partial.size)})

    async def _filled(self, request: web.Request, partial: Partial, size: int) -> bool:
        """False: the request ended, or fell silent, or took too long, before the file was whole."""
        limits = self._limits
        with contextlib.suppress(TimeoutError, ClientError, web.RequestPayloadError, ConnectionError):
            async with asyncio.timeout(limits.longest_s):
                while chunk := await asyncio.wait_for(request.content.read(1 << 18), limits.silence_s):
                    self.bytes_up += len(chunk)
                    await asyncio.to_thread(partial.write, chunk)
        return partial.size == size

    # Down

    async def _get(self, request: web.Request) -> web.StreamResponse:
        id = request.match_info["id"]
        path = await asyncio.to_thread(self._desk.blob, id) if _ID.match(id) else None
        if path is None:
            return (
                await self._offset(id) if request.method == hdrs.METH_HEAD else _refused(404, "no adapter of that name")
            )
        if self._downloads >= self._limits.downloads:
            return _later("too many downloads at once")
        return _Download(self, path)

    @contextmanager
    def downloading(self) -> Iterator[float]:
        """The seconds that it may take."""
        self._downloads += 1
        try:
            yield self._limits.longest_s
        finally:
            self._downloads -= 1

    async def _offset(self, id: str) -> web.Response:
        """Of an upload."""
        try:
            wanted = await asyncio.to_thread(self._desk.expects, id)
        except LookupError:
            return web.Response(status=404)
        if isinstance(wanted, str):
            return web.Response(status=403)
        if await asyncio.to_thread(self._desk.is_here, id):
            return web.Response(status=200, headers={OFFSET: str(wanted.bytes), COMPLETE: "?1"})
        return web.Response(status=200, headers={OFFSET: str(_size(self._desk.incoming(id)))})


class _Download(web.FileResponse):
    """Sent by `prepare`, after the handler has returned."""

    def __init__(self, server: BlobServer, path: Path) -> None:
        super().__init__(path, headers={hdrs.CONTENT_TYPE: "application/octet-stream"})
        self._server = server

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        with self._server.downloading() as seconds:
            async with asyncio.timeout(seconds):
                writer = await super().prepare(request)
        if request.method == hdrs.METH_GET and self.content_length:
            self._server.bytes_down += self.content_length
        return writer


class _Guard:
    """Ends connections that hold a place without a request: aiohttp waits for the first one for ever."""

    def __init__(self, limits: BlobLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._busy: set[object] = set()
        self._idle: dict[object, float] = {}  # since when

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self._busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)
            self._idle.pop(request.protocol, None)

    def sweep(self, server: web.Server | None) -> None:
        now = self._clock()
        waiting = [each for each in server.connections if each not in self._busy] if server else []
        self._idle = {each: self._idle.get(each, now) for each in waiting}
        room = self._limits.connections - len(self._busy)
        for place, each in enumerate(waiting):
            if now - self._idle[each] > self._limits.silence_s or place >= room:
                each.force_close()


def _misplaced(request: web.Request, partial: Partial, size: int) -> web.Response | None:
    """The answer to an upload that does not fit to what is there. Without a Content-Range it is a new beginning."""
    told = request.headers.get(hdrs.CONTENT_RANGE)
    if told is None:
        partial.restart()
        if request.content_length is not None and request.content_length != size:
            return _refused(413, f"{size} bytes were offered, {request.content_length} would come")
        return None
    found = _RANGE.fullmatch(told)
    if found is None or int(found[3]) != size or int(found[2]) >= size:
        return _refused(413, f"{size} bytes were offered: Content-Range has to be bytes FIRST-LAST/{size}")
    if int(found[1]) != partial.size:
        return _refused(409, "go on at Upload-Offset", **{OFFSET: str(partial.size)})
    return None


@contextmanager
def _gone_if_wrong(partial: Partial) -> Iterator[None]:
    try:
        yield
    except HashMismatch:
        partial.restart()
        raise


def _size(destination: Path) -> int:
    try:
        return partial_path(destination).stat().st_size
    except OSError:
        return 0


def _refused(status: int, message: str, **headers: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


def _later(message: str) -> web.Response:
    return _refused(429, message, **{hdrs.RETRY_AFTER: str(_RETRY_S)})


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
