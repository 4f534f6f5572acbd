"""Whether the cloud can be reached, lets this device in and understands its tokens."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import aiohttp

from agent.config import Cloud
from agent.doctor.finding import Finding
from protocol.errors import ProtocolError
from protocol.resolve import MAX_FRAME, VERSION, Hello, decode_from_cloud

TIMEOUT = 3.0  # seconds that the other side gets for each answer
_SKEW = 60.0  # seconds by which two clocks may differ

_NOT_OURS = "point cloud.url at a `skerry serve`"


class _Found(Exception):
    """The finding that ends the examination."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.finding = Finding("error", "cloud", text, remedy)


async def check_cloud(cloud: Cloud, tokenizer: str | None, now: float, timeout: float = TIMEOUT) -> list[Finding]:
    """`tokenizer`: the SLM's fingerprint, None if it could not be loaded; `now`: seconds since 1970."""
    if not cloud.url:
        return [Finding("ok", "cloud", "none configured: this device works alone")]
    url = cloud.url.rstrip("/")
    try:
        async with aiohttp.ClientSession() as http:
            date = await _health(http, url, timeout)
            hello, round_trip = await _handshake(http, url, cloud.key, timeout)
    except _Found as found:
        return [found.finding]
    text = f"{url} answers: model {hello.model}, round trip {round_trip * 1000:.1f} ms"
    findings = [Finding("ok", "cloud", text), _check_deadline(cloud, round_trip), _check_tokenizer(hello, tokenizer)]
    findings += [_check_version(hello), _check_skew(date, now)]
    return [finding for finding in findings if finding is not None]


async def _health(http: aiohttp.ClientSession, url: str, timeout: float) -> str:
    """GET /health; what it says of the date. Raises _Found."""
    where = urlsplit(url)
    try:
        if where.scheme not in ("http", "https") or not where.hostname:
            raise aiohttp.InvalidURL(url)
        limits = aiohttp.ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
        async with http.get(f"{url}/health", timeout=limits, allow_redirects=False) as response:
            said = await response.json(content_type=None) if response.status == 200 else None
            if not isinstance(said, dict) or said.get("status") != "ok":
                raise _Found(f"{url} is no Skerry cloud: GET /health gives HTTP {response.status}", _NOT_OURS)
            return response.headers.get("Date", "")
    except aiohttp.InvalidURL:
        raise _Found(f"{url!r} is not a URL", "write cloud.url as http://host:8431 or https://host") from None
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        raise _unreachable(error, url, timeout) from None


def _unreachable(error: Exception, url: str, timeout: float) -> _Found:
    where = urlsplit(url)
    place = f"{where.hostname}:{where.port or (443 if where.scheme == 'https' else 80)}"
    match error:
        case aiohttp.ConnectionTimeoutError():
            text = f"{place} does not take a connection within {timeout:g} s"
            return _Found(text, "check that the machine is on and no firewall drops packets to this port")
        case TimeoutError():
            text = f"{place} takes the connection but says nothing within {timeout:g} s"
            return _Found(text, "restart `skerry serve` there; check proxies and firewalls on the way")
        case aiohttp.ClientConnectorDNSError():
            return _Found(f"the name {where.hostname} is not known", "correct cloud.url, or check this machine's DNS")
        case aiohttp.ClientSSLError():
            text = f"no TLS with {place}: {error}"
            return _Found(text, "http:// and https:// may be mixed up in cloud.url, or the certificate is not trusted")
        case aiohttp.ClientConnectorError(errno=errno.ECONNREFUSED):
            remedy = "start `skerry serve` there, or correct host and port in cloud.url"
            return _Found(f"{place} refuses connections: nothing listens there", remedy)
        case aiohttp.ClientConnectorError():
            text = f"{place} cannot be reached: {os.strerror(error.errno) if error.errno else error}"
            return _Found(text, "check this machine's network, and host and port in cloud.url")
        case _:
            return _Found(f"{place} is no Skerry cloud: {error or type(error).__name__}", _NOT_OURS)


async def _handshake(http: aiohttp.ClientSession, url: str, key: str, timeout: float) -> tuple[Hello, float]:
    """The cloud's Hello, and the seconds of one round trip on the open connection. Raises _Found."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with asyncio.timeout(timeout):
            async with http.ws_connect(
                f"{url}/v1/resolve", headers=headers, max_msg_size=MAX_FRAME, autoping=False
            ) as socket:
                hello = decode_from_cloud(await socket.receive_bytes())
                if not isinstance(hello, Hello):
                    raise ProtocolError("its first frame is not a Hello")
                began = time.perf_counter()
                await socket.ping()
                while (await socket.receive()).type is aiohttp.WSMsgType.PING:
                    pass
                return hello, time.perf_counter() - began
    except aiohttp.WSServerHandshakeError as error:
        raise _refused(error.status, url, key) from None
    except TimeoutError:
        text = f"{url} answers /health, but opens no WebSocket within {timeout:g} s"
        raise _Found(text, "check proxies on the way: they have to let WebSockets through") from None
    except (ProtocolError, aiohttp.ClientError, TypeError, OSError) as error:
        raise _Found(f"{url} is no Skerry cloud: {error}", _NOT_OURS) from None


def _refused(status: int, url: str, key: str) -> _Found:
    if status in (401, 403) and key:
        return _Found(f"{url} refuses the key", "`skerry serve keys add NAME` there makes one: set it as cloud.key")
    if status in (401, 403):
        return _Found(f"{url} wants a key, and none is set", "set cloud.key (SKERRY_CLOUD_KEY)")
    if status == 503:
        return _Found(f"{url} is shutting down or full", "try again, or raise limits.connections there")
    return _Found(f"{url} is no Skerry cloud: /v1/resolve gives HTTP {status}", _NOT_OURS)


def _check_deadline(cloud: Cloud, round_trip: float) -> Finding | None:
    if round_trip * 1000 < cloud.deadline_ms:
        return None
    text = f"a round trip takes {round_trip * 1000:.0f} ms, but cloud.deadline_ms = {cloud.deadline_ms}: all come late"
    return Finding("warn", "deadline", text, f"set cloud.deadline_ms above {round_trip * 1000:.0f}, or bring it nearer")


def _check_tokenizer(hello: Hello, tokenizer: str | None) -> Finding | None:
    if tokenizer is None:
        return None
    if hello.tokenizer == tokenizer:
        return Finding("ok", "tokenizer", "the same on both sides: they speak token ids")
    known = "the cloud has another one" if hello.tokenizer else "the cloud's is not known"
    return Finding("ok", "tokenizer", f"{known}: they speak bytes")


def _check_version(hello: Hello) -> Finding | None:
    if hello.version == VERSION:
        return None
    older = "the cloud" if hello.version < VERSION else "this device"
    text = f"the cloud speaks version {hello.version} of the protocol, this device {VERSION}"
    return Finding("warn", "protocol", text, f"update Skerry on {older}")


def _check_skew(date: str, now: float) -> Finding | None:
    try:
        skew = now - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    if abs(skew) <= _SKEW:
        return None
    text = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the cloud's"
    return Finding("warn", "clock", text, "set both by NTP: sudo timedatectl set-ntp true")
