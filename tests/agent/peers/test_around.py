"""Who is around, as statuses and the edge's directory tell it."""

from __future__ import annotations

from collections.abc import Sequence

from agent.peers.around import Around
from protocol.peers import Directory, Known, encode_directory
from protocol.presence import MAX_DEVICES, status
from protocol.topics import DIRECTORY, EDGE, STATUS
from protocol.transport.base import Delivery
from tests.agent.peers.devices import A
from tests.protocol.entries import SPACE, someone

LAMP, FRIDGE = someone(1).public, someone(2).public
OTHER = b"another space..."


class Place:
    def __init__(self) -> None:
        self.newcomers = 0
        self.around = Around(A, "me", self._newcomer)
        self._session = 0

    def _newcomer(self) -> None:
        self.newcomers += 1

    def status(self, name: str, *, online: bool = True, key: bytes = LAMP, spaces: Sequence[bytes] = (SPACE,)) -> None:
        self._session += online
        payload = status(self._session, online, key, spaces if online else ())
        self.around.roster.take(Delivery(A.path(STATUS, name), payload, False))

    def removed(self, name: str) -> None:
        self.around.roster.take(Delivery(A.path(STATUS, name), b"", False))

    def directory(self, *devices: Known) -> None:
        payload = encode_directory(Directory("A", list(devices)))
        self.around.directory(Delivery(A.path(DIRECTORY, EDGE), payload, True))


def known(name: str, cluster: str, hops: int, key: bytes = FRIDGE) -> Known:
    return Known(name, cluster, key.hex(), [SPACE.hex()], hops)


def test_others_that_are_online_and_share_a_space_hold_it() -> None:
    place = Place()
    place.status("lamp")
    place.status("door", spaces=[OTHER])
    place.status("me")
    place.status("edge")
    assert place.around.holders(SPACE) == ["lamp"]
    assert place.around.holders(OTHER) == ["door"]
    assert place.around.others() == {"lamp", "door"}
    place.status("lamp", online=False)
    assert place.around.holders(SPACE) == []


def test_what_somebody_wanted_before_it_left_is_still_wanted() -> None:
    place = Place()
    assert not place.around.wanted(SPACE)
    place.status("lamp")
    place.status("lamp", online=False)
    assert place.around.wanted(SPACE)
    place.status("lamp", spaces=[OTHER])
    assert not place.around.wanted(SPACE)
    place.removed("lamp")
    assert not place.around.wanted(OTHER)


def test_keys_are_known_as_long_as_they_are_announced_now_and_then() -> None:
    place = Place()
    assert place.around.key_of("lamp") is None
    place.status("lamp")
    place.status("lamp")
    assert place.newcomers == 1
    assert place.around.key_of("lamp") == LAMP
    assert place.around.name_of(LAMP) == "lamp"
    place.status("lamp", online=False)
    assert place.around.knows(LAMP)
    place.status("lamp", key=FRIDGE)  # another device under an old name
    assert place.newcomers == 2
    assert place.around.key_of("lamp") == FRIDGE
    assert place.around.name_of(someone(3).public) == someone(3).public.hex()[:8]


class TestWhoseKeyItIs:
    def test_nobody_takes_the_name_off_anothers_key(self) -> None:
        place = Place()
        place.status("lamp", key=LAMP)
        place.status("evil", key=LAMP)
        assert place.around.name_of(LAMP) == "lamp"
        place.status("lamp", online=False, key=LAMP)
        place.status("evil", key=LAMP)
        assert place.around.name_of(LAMP) == "lamp"

    def test_what_is_given_up_can_be_taken(self) -> None:
        place = Place()
        place.status("lamp", key=LAMP)
        place.status("lamp", key=FRIDGE)
        place.status("lamp-2", key=LAMP)
        assert place.around.name_of(LAMP) == "lamp-2"

    def test_the_edge_does_not_rename_a_device_of_this_cluster(self) -> None:
        place = Place()
        place.status("lamp", key=LAMP)
        place.directory(known("evil", "B", 1, LAMP))
        assert place.around.name_of(LAMP) == "lamp"
        place.removed("lamp")
        place.directory(known("evil", "B", 1, LAMP))
        assert place.around.name_of(LAMP) == "lamp"

    def test_a_device_of_this_cluster_knows_better_than_the_edge(self) -> None:
        place = Place()
        place.directory(known("lamp", "B", 1, LAMP))
        place.directory(known("torch", "B", 1, LAMP))
        assert place.around.name_of(LAMP) == "B/torch"
        place.status("lamp", key=LAMP)
        assert place.around.name_of(LAMP) == "lamp"


def test_the_edge_tells_who_is_within_reach() -> None:
    place = Place()
    place.directory(known("lamp", "A", 0, LAMP), known("fridge", "B", 2))
    assert place.around.reaches(SPACE, 2)
    assert not place.around.reaches(SPACE, 1)
    assert not place.around.reaches(OTHER, 4)
    assert place.around.name_of(FRIDGE) == "B/fridge"
    assert not place.around.knows(LAMP)  # of its own cluster a device hears itself
    place.directory(known("fridge", "B", 1), known("door", "C", 3))
    assert place.around.reaches(SPACE, 1)
    place.directory()
    assert not place.around.reaches(SPACE, 4)


def test_an_edge_that_is_removed_reaches_nobody() -> None:
    place = Place()
    place.directory(known("fridge", "B", 1))
    place.around.directory(Delivery(A.path(DIRECTORY, EDGE), b"", True))
    assert not place.around.reaches(SPACE, 4)


def test_rubbish_changes_nothing() -> None:
    place = Place()
    place.directory(known("fridge", "B", 1))
    for payload in (b"{", b'{"version": 1, "cluster": 5}', bytes(300_000)):
        place.around.directory(Delivery(A.path(DIRECTORY, EDGE), payload, True))
    place.around.directory(Delivery(A.path(DIRECTORY, EDGE), b'{"version": 2}', True))
    assert (place.around.malformed, place.around.newer) == (3, 1)
    assert place.around.reaches(SPACE, 1)


def test_whatever_is_announced_is_bounded() -> None:
    place = Place()
    for number in range(MAX_DEVICES + 200):
        place.status(f"device-{number}")
        place.status(f"device-{number}", online=False)
    assert len(place.around._announced._spaces) <= MAX_DEVICES
    assert place.around.wanted(SPACE)
