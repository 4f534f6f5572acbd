"""Adapters over HTTP to and from the edge, by the SHA-256 of their files; both ways go on where they were cut off."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from models.download import Timeouts, download
from models.partial import Partial
from protocol.adapters import Blob
from protocol.errors import LinkError

TIMEOUTS = Timeouts(connect=5.0, read=20.0)
_CHUNK = 1 << 16
_REASON = 2048  # bytes of an answer that are read
_WHOLE = {200, 201}
_FINAL = {400, 403, 405, 413, 422}  # trying again would bring the same


class Refused(Exception):
    """The edge does not want this adapter, and says why."""


class NotOffered(LinkError):
    """The edge has not heard of it yet, or has forgotten."""


def upload(
    url: str, id: str, path: Path, sent: Callable[[int], None], ended: Callable[[], bool], timeouts: Timeouts = TIMEOUTS
) -> None:
    """Brings what the edge lacks of the file. `sent` hears of bytes; when `ended` says so, it stops in between.
    Raises Refused, NotOffered, LinkError; after the latter it can go on."""
    size = path.stat().st_size
    try:
        offset = _offset(url, id, timeouts)
        if offset is None:
            return
        with closing(_connection(url, timeouts)) as connection, path.open("rb") as file:
            connection.putrequest("PUT", _path(url, id))
            connection.putheader("Content-Type", "application/octet-stream")
            if 0 < offset < size:
                file.seek(offset)
                connection.putheader("Content-Range", f"bytes {offset}-{size - 1}/{size}")
            connection.putheader("Content-Length", str(size - file.tell()))
            connection.endheaders()
            try:
                while chunk := file.read(_CHUNK):
                    if ended():
                        raise LinkError("the upload was broken off")
                    connection.send(chunk)
                    sent(len(chunk))
            except ConnectionError:
                pass  # it may have answered before the end
            _judge(connection.getresponse())
    except (OSError, http.client.HTTPException) as error:
        raise LinkError(f"the edge cannot be reached: {type(error).__name__}") from None


def fetch(url: str, blob: Blob, folder: Path, came: Callable[[int], None], timeouts: Timeouts = TIMEOUTS) -> Path:
    """The agreed adapter's file, which is fetched unless it is there; whole and verified, or not there. `came` hears of
    bytes. Raises PullError: SourceUnreachable, HashMismatch, DiskFull and so on."""
    destination = folder / f"{blob.id}.gguf"
    if destination.exists():
        return destination
    with Partial(destination, blob.bytes) as partial:
        before = partial.size

        def report(size: int) -> None:
            nonlocal before
            came(max(0, size - before))
            before = size

        if partial.size < blob.bytes:
            download(f"{url}/{blob.id}", partial, blob.bytes, timeouts, report)
        try:
            partial.check(blob.id)
        except BaseException:
            partial.restart()  # damaged on the way: the next attempt begins anew
            raise
        partial.publish()
    return destination


def _offset(url: str, id: str, timeouts: Timeouts) -> int | None:
    """How much of it the edge has; None: all of it, from an earlier round perhaps."""
    with closing(_connection(url, timeouts)) as connection:
        connection.request("HEAD", _path(url, id))
        response = connection.getresponse()
        if response.status == 404:
            raise NotOffered("the edge does not know of the offer yet")
        if response.status == 403:
            raise Refused("the edge refused the offer")
        if response.getheader("Upload-Complete") == "?1":
            return None
        told = response.getheader("Upload-Offset", "0")
        return int(told) if response.status == 200 and told.isdigit() else 0


def _judge(response: http.client.HTTPResponse) -> None:
    if response.status in _WHOLE:
        return
    reason = _message(response.read(_REASON))
    if response.status == 404:
        raise NotOffered(reason)
    if response.status in _FINAL:
        raise Refused(reason)
    raise LinkError(f"the edge answers HTTP {response.status}: {reason}")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "no reason given"


def _connection(url: str, timeouts: Timeouts) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeouts.connect)
    connection.connect()
    connection.sock.settimeout(timeouts.read)
    return connection


def _path(url: str, id: str) -> str:
    return f"{urlsplit(url).path.rstrip('/')}/{id}"
