"""What an edge tells of: the devices of its cluster, and those that its neighbours tell of."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping

from protocol.errors import ProtocolError
from protocol.peers import MAX_DEVICES, Directory, Known, decode_directory, encode_directory
from protocol.presence import MAX_DEVICES as ROSTER
from protocol.presence import Seen
from protocol.topics import DIRECTORY, EDGE, Cluster, is_edge
from protocol.transport.base import Delivery, Transport, Will

_PAUSE_SECONDS = 0.25  # between two directories, so that a cluster that wakes up is told of once


def merged(cluster: str, own: Iterable[Seen], heard: Mapping[str, Directory], most_hops: int) -> Directory:
    """The devices of `cluster` and, each one cluster further away than its neighbour says, those beyond, the nearest
    report of each. As many as fit into one message: first those that share something, and the nearest of them.

    Who is offline shares nothing, but is told of: others may still pass on what it learned, and its key is needed.

    A device that is gone may be told of in a circle for a while, one hop further each time: `most_hops` ends that, as
    in RIP (RFC 2453, section 2.2).
    """
    known = {
        (cluster, seen.name): Known(seen.name, cluster, seen.key.hex(), sorted(space.hex() for space in seen.spaces))
        for seen in own
    }
    for directory in heard.values():
        for device in directory.devices:
            hops = device.hops + 1
            place = (device.cluster, device.name)
            if device.cluster != cluster and hops <= most_hops and (place not in known or hops < known[place].hops):
                known[place] = Known(device.name, device.cluster, device.key, device.spaces, hops)
    order = sorted(known.values(), key=lambda device: (not device.spaces, device.hops, device.cluster, device.name))
    nearest = order[:MAX_DEVICES]
    while len(encode_directory(Directory(cluster, nearest))) > DIRECTORY.limit:
        nearest = nearest[: len(nearest) * 9 // 10]
    return Directory(cluster, nearest)


class Listing:
    """Keeps the directory of `cluster` at its broker `home`; a thread of its own publishes it. `malformed` counts
    directories of neighbours that were dropped."""

    def __init__(self, cluster: Cluster, home: Transport, most_hops: int) -> None:
        self.malformed = 0
        self._cluster = cluster
        self._home = home
        self._most_hops = most_hops
        self._topic = cluster.path(DIRECTORY, EDGE)
        self._changed = threading.Condition()  # of what follows
        self._own: dict[str, Seen] = {}
        self._heard: dict[str, Directory] = {}
        self._keys: dict[str, frozenset[str]] = {}  # by neighbour, of the devices it told of
        self._due = False
        self._published = b""
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="directory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def will(self) -> Will:
        """Without its edge a cluster reaches nobody."""
        return Will(self._topic, self._empty())

    def close(self) -> None:
        """Takes back what was told."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._home.publish(self._topic, self._empty(), qos=DIRECTORY.qos, retain=True)

    def _empty(self) -> bytes:
        return encode_directory(Directory(self._cluster.name))

    def refresh(self) -> None:
        """Something may have changed, or the broker may have forgotten it."""
        with self._changed:
            self._due = True
            self._changed.notify()

    def member(self, before: Seen | None, after: Seen | None) -> None:
        """A device of this cluster came, changed or went."""
        seen = after or before
        if seen is None or is_edge(seen.name):
            return
        with self._changed:
            self._own.pop(seen.name, None)
            if after is not None:
                self._own[after.name] = after
            if len(self._own) > ROSTER:
                del self._own[next(iter(self._own))]
        self.refresh()

    def retained(self, delivery: Delivery) -> None:
        """What is at the broker, on our own topic: an old connection's will, for example."""
        if delivery.payload != self._published:
            self.refresh()

    def heard(self, neighbour: str, delivery: Delivery) -> None:
        """The directory of a neighbour; an empty message means that it has none any more."""
        try:
            told = decode_directory(delivery.payload) if delivery.payload else None
        except ProtocolError:
            self.malformed += 1
            return
        if told is not None and told.cluster != neighbour:
            self.malformed += 1
            return
        with self._changed:
            self._forget(neighbour)
            if told is not None:
                self._heard[neighbour] = told
                self._keys[neighbour] = frozenset(device.key for device in told.devices)
        self.refresh()

    def lost(self, neighbour: str) -> None:
        """Its broker cannot be reached."""
        with self._changed:
            self._forget(neighbour)
        self.refresh()

    def _forget(self, neighbour: str) -> None:
        self._heard.pop(neighbour, None)
        self._keys.pop(neighbour, None)

    def routes(self, space: bytes, hops: int, avoid: Collection[str]) -> list[str]:
        """Neighbours not to be avoided that told of a device with the space, at most `hops` clusters from them."""
        wanted = space.hex()
        with self._changed:
            heard = list(self._heard.items())
        return [
            neighbour
            for neighbour, directory in heard
            if neighbour not in avoid
            and any(
                device.hops <= hops and device.cluster not in avoid and wanted in device.spaces
                for device in directory.devices
            )
        ]

    def knows(self, origin: bytes) -> bool:
        """Does a device of this cluster, or one that a neighbour told of, have this key?"""
        key = origin.hex()
        with self._changed:
            own = any(seen.key == origin for seen in self._own.values())
            return own or any(key in keys for keys in self._keys.values())

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                self._changed.wait_for(lambda: self._closing, _PAUSE_SECONDS)
                if self._closing:
                    return
                self._due = False
                own, heard = list(self._own.values()), dict(self._heard)
            directory = merged(self._cluster.name, own, heard, self._most_hops)
            self._published = encode_directory(directory)
            self._home.publish(self._topic, self._published, qos=DIRECTORY.qos, retain=True)
