"""One file over HTTP into a Partial, resumed by range requests."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as bound
from typing import Any

from models.partial import Partial
from protocol.errors import HashMismatch, SourceUnreachable

_CHUNK = 1 << 18  # bytes; small enough for a progress bar that moves on a slow link
_ATTEMPTS = 5  # a connection that breaks is taken up again this often, as long as each brought something


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `read` is the longest silence, not the whole download's time."""

    connect: float = 5.0
    read: float = 30.0


def download(url: str, partial: Partial, size: int, timeouts: Timeouts, report: Callable[[int], None]) -> None:
    """Fetches what `partial` lacks of the `size` bytes at `url`.

    No validator (ETag) is compared on resuming: content is named by its SHA-256 in the catalog, which the
    caller checks over the whole file, and the hub's redirects give changing ETags. Raises SourceUnreachable,
    HashMismatch (another length than the catalog's) and what `Partial.write` raises.
    """
    opener = urllib.request.build_opener(_Http(timeouts.read), _Https(timeouts.read))
    for attempt in range(1, _ATTEMPTS + 1):
        before = partial.size
        try:
            _fetch(opener, url, partial, size, timeouts, report)
            return
        except SourceUnreachable:
            if attempt == _ATTEMPTS or partial.size <= before:
                raise


def _fetch(
    opener: urllib.request.OpenerDirector,
    url: str,
    partial: Partial,
    size: int,
    timeouts: Timeouts,
    report: Callable[[int], None],
) -> None:
    headers = {"User-Agent": "skerry", "Accept-Encoding": "identity"}
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=timeouts.connect) as response:
            _place(response, partial, size)
            while chunk := response.read1(_CHUNK):
                partial.write(chunk)
                report(partial.size)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # it has fewer bytes than we already hold
            raise HashMismatch(f"has no more than {partial.size:,} bytes, the catalog names {size:,}") from None
        raise SourceUnreachable(f"answers HTTP {error.code} {error.reason}") from None
    except TimeoutError:
        raise SourceUnreachable(f"is silent for more than {timeouts.read:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise SourceUnreachable(f"cannot be reached: {reason}") from None
    if partial.size < size:
        raise SourceUnreachable(f"broke off after {partial.size:,} of {size:,} bytes")


def _place(response: Any, partial: Partial, size: int) -> None:
    """Makes `partial` end where the response's body starts, and refuses a body of the wrong length unread."""
    resumed = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or not resumed or int(resumed[1]) != partial.size:
        partial.restart()
        if response.status == 206:
            raise SourceUnreachable("answers with another part of the file than was asked for")
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and partial.size + int(length) != size:
        raise HashMismatch(f"has {partial.size + int(length):,} bytes, the catalog names {size:,}")


class _Patient(http.client.HTTPConnection):
    """Connects within the request's time-out, then waits for data up to `read` seconds."""

    def __init__(self, host: str, *, read: float, **options: Any) -> None:
        super().__init__(host, **options)
        self._read = read

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._read)


class _PatientTls(_Patient, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def __init__(self, read: float) -> None:
        super().__init__()
        self._read = read

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(bound(_Patient, read=self._read), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, read: float) -> None:
        super().__init__()
        self._read = read

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(bound(_PatientTls, read=self._read), req)
