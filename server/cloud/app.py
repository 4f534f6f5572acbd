"""The resolver as an HTTP server: the WebSocket `/v1/resolve`, `/health`, `/ready` and `/metrics`."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Callable

from aiohttp import WSCloseCode, web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from protocol.errors import AuthError, ConfigError
from protocol.resolve import Refused
from server.cloud.config import ServeConfig
from server.cloud.connection import Connection
from server.cloud.keys import Key, Keys, keys_path
from server.cloud.limits import Allowance
from server.cloud.metrics import Metrics
from server.cloud.upstream import Upstream

log = logging.getLogger(__name__)

_PING_S = 30.0  # how often a silent connection is asked whether it is still there
_SWEEP_S = 1.0  # how often idle sessions and revoked keys are looked for
_RETRY_S = 2.0


class Server:
    """The resolver's state and its routes. `clock` is in seconds."""

    def __init__(self, config: ServeConfig, upstream: Upstream, keys: Keys, clock: Callable[[], float]) -> None:
        self.upstream = upstream
        self.metrics = Metrics()
        self.clock = clock
        self._limits = config.limits
        self._keys = keys
        self._connections: set[Connection] = set()
        self._sessions: Counter[Key | None] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()
        self._allowances: dict[Key | None, Allowance] = {}
        self._draining = False

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/resolve", self._resolve),
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    def admit(self, session: int, key: Key | None) -> Refused | None:
        if self._draining:
            return Refused(session, -1, "draining", "the server is shutting down", _RETRY_S)
        if self._sessions.total() >= self._limits.sessions:
            return Refused(session, -1, "overloaded", "every session of this server is taken", _RETRY_S)
        if self._sessions[key] >= self._limits.sessions_per_key:
            return Refused(session, -1, "overloaded", "every session of this key is taken", _RETRY_S)
        self._count(key, 1)
        return None

    def leave(self, key: Key | None) -> None:
        self._count(key, -1)

    def _count(self, key: Key | None, change: int) -> None:
        self._sessions[key] += change
        total = self._sessions.total()
        self.metrics.sessions.set(total)
        if total:
            self._empty.clear()
        else:
            self._empty.set()

    async def sweep(self) -> None:
        """Ends what has been idle for too long or whose key was revoked."""
        for connection in list(self._connections):
            if not self._keys.holds(connection.key):
                await connection.close(WSCloseCode.POLICY_VIOLATION, "the key was revoked")
            for refusal in connection.expire(self._limits.idle_s):
                await connection.send(refusal)

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, and lets running sessions finish for so long."""
        self._draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            log.warning("%d sessions are cut off", self._sessions.total())

    async def disconnect(self) -> None:
        self._draining = True
        closing = [connection.close(WSCloseCode.GOING_AWAY, "shutting down") for connection in self._connections]
        await asyncio.gather(*closing)

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        if "Origin" in request.headers:  # a web page must not use its visitor's loopback address
            return _error(403, "browsers are not served")
        try:
            key = self._authenticate(request)
        except AuthError as error:
            return self._denied(error)
        if self._draining or len(self._connections) >= self._limits.connections:
            response = _error(503, "the server is shutting down" if self._draining else "too many connections")
            response.headers["Retry-After"] = f"{_RETRY_S:.0f}"
            return response
        socket = web.WebSocketResponse(
            max_msg_size=self._limits.frame_bytes, compress=False, heartbeat=_PING_S, timeout=_RETRY_S
        )
        await socket.prepare(request)
        allowance = self._allowances.setdefault(key, Allowance(self._limits.asks_per_second, self.clock))
        connection = Connection(self, socket, key, allowance)
        self._connections.add(connection)
        self.metrics.connections.set(len(self._connections))
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self.metrics.connections.set(len(self._connections))
        return socket

    def _authenticate(self, request: web.Request) -> Key | None:
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        return self._keys.check(secret.strip() if scheme.lower() == "bearer" else None)

    def _denied(self, error: AuthError) -> web.Response:
        self.metrics.denied.inc()
        response = _error(401, str(error))
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self._draining:
            return web.json_response({"status": "draining"}, status=503)
        if not await self.upstream.ready():
            return web.json_response({"status": "the LLM is not reachable"}, status=503)
        return web.json_response({"status": "ready", "model": self.upstream.name})

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            self._authenticate(request)
        except AuthError as error:
            return self._denied(error)
        return web.Response(body=generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


class RunningServer:
    """A server that listens. `server.sweep` runs by itself."""

    def __init__(self, server: Server, runner: web.AppRunner, host: str, drain_s: float) -> None:
        self.server = server
        self.host = host
        self.port: int = runner.addresses[0][1]
        self._runner = runner
        self._drain_s = drain_s
        self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            await self.server.sweep()

    async def drain(self) -> None:
        """Lets running sessions finish, for as long as the configuration says. `close` comes after it."""
        await self.server.drain(self._drain_s)

    async def close(self) -> None:
        """Closes every connection. The upstream is whoever's that opened it."""
        self._sweeper.cancel()
        await self.server.disconnect()
        await self._runner.cleanup()


async def start(
    config: ServeConfig, upstream: Upstream, *, clock: Callable[[], float] = time.monotonic
) -> RunningServer:
    """Listens. Raises ConfigError if it may not or can't listen there."""
    listen = config.listen
    path = keys_path(listen.keys_file)
    keys = Keys(path)
    if not keys.required and not _loopback(listen.host):
        raise ConfigError(
            f"listen.host = {listen.host!r} is open to other machines, which needs keys, and {path} does not exist: "
            "make one with `skerry serve keys add NAME`, or listen on 127.0.0.1"
        )
    server = Server(config, upstream, keys, clock)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=_RETRY_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, listen.host, listen.port).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on {listen.host}:{listen.port}: {error.strerror}") from None
    return RunningServer(server, runner, listen.host, config.drain.seconds)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
