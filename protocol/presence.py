"""Who is there: the status that each device keeps retained at the broker, and the roster that an observer builds of it.

A device numbers its sessions. It publishes its birth when it has connected, and the broker publishes its will, under
the same number, when it is gone. The number decides, not the order of arrival:

- an end (`online` false) of session n ends every session up to n, for good;
- a birth counts only if its session is newer than every session that has ended.

So the will of an old connection, however late the broker notices its death, can't hide a device that is back. The
device itself watches its topic and repairs what is retained there (agent/link/presence.py).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.errors import ProtocolError
from protocol.limits import Buckets
from protocol.memory import ORIGIN_BYTES, SPACE_BYTES
from protocol.reading import reader
from protocol.topics import STATUS, Cluster
from protocol.transport.base import Delivery, Transport

VERSION = 1
MAX_SESSION = 1 << 53  # what every JSON reader can hold exactly
MAX_SPACES = 32
MAX_DEVICES = 4096
NEW_KEYS = 3  # that a device may have in a day, besides its first
_DAY = 86_400.0

# \Z, since $ would allow a line break after it
_Key = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * ORIGIN_BYTES}}}\\Z")]
_Space = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * SPACE_BYTES}}}\\Z")]


class Status(msgspec.Struct, frozen=True, tag_field="version", tag=VERSION):
    """`key`: the device's public key; `spaces`: ids of the spaces it shares (both in hex). `agent`: its version."""

    session: Annotated[int, Meta(ge=0, le=MAX_SESSION)]
    online: bool
    key: _Key
    spaces: Annotated[list[_Space], Meta(max_length=MAX_SPACES)] = []
    agent: Annotated[str, Meta(max_length=64)] = ""


_encode = msgspec.json.Encoder().encode


def status(session: int, online: bool, key: bytes, spaces: Sequence[bytes] = (), agent: str = "") -> bytes:
    """The message, encoded."""
    return _encode(Status(session, online, key.hex(), [space.hex() for space in spaces], agent))


decode_status = reader(STATUS, msgspec.json.Decoder(Status).decode, VERSION)
"""None for a newer version. Raises ProtocolError."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A device as the roster knows it. `key`: 32 bytes; each of `spaces`: 16."""

    name: str
    session: int
    online: bool
    key: bytes
    spaces: frozenset[bytes] = frozenset()


class Roster:
    """The devices of a cluster, at most 4,096. Safe to use from several threads.

    `on_change` is called on the transport's thread, with the device as it was (None: new) and as it is (None: its
    status was removed). `malformed`, `newer`, `stale`, `crowded` and `unbelieved` count what was ignored and why;
    `rekeyed`, how often a device came back with another key, which is another device under an old name.

    The broker proves names, and a key costs nothing. So one name is believed 3 new keys a day, even if its status was
    removed in between, and none while its last one is `barred` (a quarantine, say).

    If the broker dies together with a device, nobody publishes its will: an online device may not answer.
    """

    def __init__(
        self,
        cluster: Cluster,
        on_change: Callable[[Seen | None, Seen | None], None] = lambda before, after: None,
        barred: Callable[[bytes], bool] = lambda key: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.malformed = self.newer = self.stale = self.crowded = self.rekeyed = self.unbelieved = 0
        self._cluster = cluster
        self._on_change = on_change
        self._barred = barred
        self._new_keys = Buckets(NEW_KEYS / _DAY, NEW_KEYS, clock, most=MAX_DEVICES)
        self._keys: OrderedDict[str, bytes] = OrderedDict()  # the last that was believed, by name
        self._lock = threading.Lock()
        self._seen: dict[str, Seen] = {}

    def watch(self, transport: Transport) -> None:
        transport.subscribe(self._cluster.path(STATUS), self.take, qos=STATUS.qos)

    def get(self, name: str) -> Seen | None:
        return self._seen.get(name)

    def online(self) -> list[Seen]:
        with self._lock:
            return [seen for seen in self._seen.values() if seen.online]

    def take(self, delivery: Delivery) -> None:
        """One status, from anybody."""
        name = self._cluster.sender(delivery.topic)
        if name is None or delivery.topic != self._cluster.path(STATUS, name):
            self.malformed += 1
            return
        before = self._seen.get(name)
        if not delivery.payload:  # how a retained message is removed
            self._put(name, before, None)
            return
        try:
            told = decode_status(delivery.payload)
        except ProtocolError:
            self.malformed += 1
            return
        if told is None:
            self.newer += 1
            return
        spaces = frozenset(map(bytes.fromhex, told.spaces))
        after = Seen(name, told.session, told.online, bytes.fromhex(told.key), spaces)
        if before is not None and not (after.online and before.key != after.key) and not _follows(before, after):
            self.stale += 1
            return
        if before is None and not self._room():
            self.crowded += 1
            return
        if not self._believed(name, after.key):
            self.unbelieved += 1
            return
        self._put(name, before, after)

    def _believed(self, name: str, key: bytes) -> bool:
        last = self._keys.get(name, key)
        if last != key:
            if self._barred(last) or not self._new_keys.take(name):
                return False
            self.rekeyed += 1
        self._keys[name] = key
        self._keys.move_to_end(name)
        if len(self._keys) > MAX_DEVICES:
            self._keys.popitem(last=False)
        return True

    def _put(self, name: str, before: Seen | None, after: Seen | None) -> None:
        with self._lock:
            if after is None:
                self._seen.pop(name, None)
            else:
                self._seen[name] = after
        if before != after:
            self._on_change(before, after)

    def _room(self) -> bool:
        """Whoever is offline makes room."""
        with self._lock:
            if len(self._seen) < MAX_DEVICES:
                return True
            gone = next((name for name, seen in self._seen.items() if not seen.online), None)
            if gone is not None:
                del self._seen[gone]
            return gone is not None


def _follows(before: Seen, after: Seen) -> bool:
    """Whether `after` says something newer of the same device."""
    if before.key != after.key:
        return False  # the will of whoever had the name earlier
    if after.online and not before.online:
        return after.session > before.session
    return after.session >= before.session
