"""Who is around: the devices of the cluster, and those beyond it that the edge service tells of."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from protocol.errors import ProtocolError
from protocol.peers import Directory, decode_directory
from protocol.presence import MAX_DEVICES, Roster, Seen
from protocol.topics import DIRECTORY, EDGE, Cluster, is_edge
from protocol.transport.base import Delivery, Transport

_ORIGINS = 8192  # public keys remembered
_BEYOND = "/"  # in the name of a device of another cluster


class _Index:
    """Which devices have which spaces. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spaces: dict[str, frozenset[bytes]] = {}
        self._names: dict[bytes, set[str]] = {}

    def put(self, name: str, spaces: frozenset[bytes]) -> None:
        with self._lock:
            if name not in self._spaces and len(self._spaces) >= MAX_DEVICES:
                self._remove(next(iter(self._spaces)))
            self._remove(name)
            if spaces:
                self._spaces[name] = spaces
            for space in spaces:
                self._names.setdefault(space, set()).add(name)

    def _remove(self, name: str) -> None:
        for space in self._spaces.pop(name, ()):
            self._names[space].discard(name)
            if not self._names[space]:
                del self._names[space]

    def names(self, space: bytes) -> list[str]:
        with self._lock:
            return sorted(self._names.get(space, ()))


class Around:
    """Fed on the transport's thread, asked from any. `me`: this device. `newcomer` is called when a device announced a
    key that was unknown. `barred`: is a device with this key not believed under another? `malformed` and `newer` count
    directories that were dropped."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        newcomer: Callable[[], None] = lambda: None,
        barred: Callable[[bytes], bool] = lambda key: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.malformed = self.newer = 0
        self.newcomer = newcomer
        self.roster = Roster(cluster, self._changed, barred, clock)
        self._cluster = cluster
        self._me = me
        self._here, self._announced = _Index(), _Index()  # what is shared now; what was when the device was last here
        self._origins: OrderedDict[bytes, str] = OrderedDict()  # public keys, and whose they are
        self._nearest: Mapping[bytes, int] = {}  # hops to the nearest device beyond the cluster, by space

    def watch(self, transport: Transport) -> None:
        self.roster.watch(transport)
        transport.subscribe(self._cluster.path(DIRECTORY, EDGE), self.directory, qos=DIRECTORY.qos)

    def holders(self, space: bytes) -> list[str]:
        """Other devices of the cluster that are online and announced the space."""
        return self._here.names(space)

    def others(self) -> set[str]:
        """The other devices that are online."""
        return {seen.name for seen in self.roster.online() if seen.name != self._me and not is_edge(seen.name)}

    def wanted(self, space: bytes) -> bool:
        """Did another device announce the space? One that is away gets what is told meanwhile when it is back."""
        return bool(self._announced.names(space))

    def reaches(self, space: bytes, hops: int) -> bool:
        """Did the edge announce a device with the space in another cluster, at most so many away?"""
        return self._nearest.get(space, hops + 1) <= hops

    def key_of(self, device: str) -> bytes | None:
        """The public key that a device of this cluster announced."""
        seen = self.roster.get(device)
        return seen.key if seen else None

    def knows(self, origin: bytes) -> bool:
        """Did a device with this key announce itself, here or to the edge?"""
        return origin in self._origins

    def name_of(self, origin: bytes) -> str:
        """The device with this key, with its cluster if that is another one; else the key's first digits."""
        return self._origins.get(origin) or origin.hex()[:8]

    def _changed(self, before: Seen | None, after: Seen | None) -> None:
        seen = after or before
        if seen is None or seen.name == self._me or is_edge(seen.name):
            return
        spaces = after.spaces if after is not None and after.online else frozenset()
        self._here.put(seen.name, spaces)
        if after is None or after.online:
            self._announced.put(seen.name, spaces)
        if after is not None and self._remember(after.key, after.name):
            self.newcomer()

    def directory(self, delivery: Delivery) -> None:
        """What the edge knows; an empty message means that there is no edge any more."""
        try:
            told = decode_directory(delivery.payload) if delivery.payload else Directory(self._cluster.name)
        except ProtocolError:
            self.malformed += 1
            return
        if told is None:
            self.newer += 1
            return
        nearest: dict[bytes, int] = {}
        for device in told.devices:
            if device.cluster != self._cluster.name:
                self._remember(bytes.fromhex(device.key), f"{device.cluster}{_BEYOND}{device.name}")
                for space in map(bytes.fromhex, device.spaces):
                    nearest[space] = min(nearest.get(space, device.hops), device.hops)
        self._nearest = nearest

    def _remember(self, origin: bytes, name: str) -> bool:
        """True: it was unknown. The least recently announced keys are forgotten."""
        before = self._origins.get(origin)
        if before is None or not self._keeps(before, origin, name):
            self._origins[origin] = name
        self._origins.move_to_end(origin)
        if len(self._origins) > _ORIGINS:
            self._origins.popitem(last=False)
        return before is None

    def _keeps(self, holder: str, origin: bytes, name: str) -> bool:
        """Is the key still `holder`'s, though `name` announces it as well? Whoever announced it first keeps it; of its
        own cluster a device knows better than the edge."""
        if _BEYOND in holder:
            return False
        seen = self.roster.get(holder)
        return _BEYOND in name or (seen is not None and seen.key == origin)
