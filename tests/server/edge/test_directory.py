"""What an edge tells of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.peers import MAX_DEVICES, Directory, Known, decode_directory, encode_directory
from protocol.presence import Seen
from protocol.topics import DIRECTORY, Cluster
from protocol.transport.base import Delivery
from protocol.transport.bus import Bus, BusTransport
from server.edge.directory import Listing, merged
from tests.protocol.entries import SPACE, someone

LAMP, FRIDGE = someone(1).public, someone(2).public


def seen(name: str, key: bytes = LAMP, *, online: bool = True) -> Seen:
    return Seen(name, 1, online, key, frozenset([SPACE]) if online else frozenset())


def far(name: str, cluster: str, hops: int = 0, key: bytes = FRIDGE) -> Known:
    return Known(name, cluster, key.hex(), [SPACE.hex()], hops)


def test_own_devices_and_those_of_neighbours_one_further_away() -> None:
    told = merged("A", [seen("lamp")], {"B": Directory("B", [far("fridge", "B"), far("door", "C", 1)])}, 2)
    assert told.devices == [
        Known("lamp", "A", LAMP.hex(), [SPACE.hex()], 0),
        far("fridge", "B", 1),
        far("door", "C", 2),
    ]


def test_what_neighbours_tell_of_ourselves_or_too_far_away_is_left_out() -> None:
    heard = {"B": Directory("B", [far("lamp", "A", 1), far("ghost", "A", 0), far("door", "C", 2)])}
    assert merged("A", [], heard, 2).devices == []


def test_of_two_ways_the_shorter_counts() -> None:
    heard = {"B": Directory("B", [far("door", "C", 1)]), "C": Directory("C", [far("door", "C", 0)])}
    assert merged("A", [], heard, 4).devices == [far("door", "C", 1)]


def test_who_is_offline_is_told_of_for_its_key_alone() -> None:
    told = merged("A", [seen("lamp", online=False), seen("fridge", FRIDGE)], {}, 2)
    assert [(device.name, device.spaces) for device in told.devices] == [("fridge", [SPACE.hex()]), ("lamp", [])]


def test_there_is_a_limit_and_the_nearest_who_share_something_come_first() -> None:
    own = [seen(f"lamp-{number}") for number in range(300)] + [seen("off", online=False)]
    heard = {"B": Directory("B", [far(f"fridge-{number}", "B") for number in range(500)])}
    told = merged("A", own, heard, 2)
    assert len(told.devices) == MAX_DEVICES
    assert sum(device.cluster == "A" for device in told.devices) == 300
    assert decode_directory(encode_directory(told)) == told


def test_long_ones_are_cut_to_fit_into_a_message() -> None:
    many = frozenset(bytes([number]) * 16 for number in range(32))
    own = [Seen(f"{number:064}", 1, True, LAMP, many) for number in range(400)]
    told = merged("A", own, {}, 2)
    assert len(encode_directory(told)) <= DIRECTORY.limit
    assert len(told.devices) > 100


def test_news_of_a_device_that_is_gone_dies_out_in_a_ring() -> None:
    """C was heard of directly, and is gone; A and B still tell each other of it, each time from further away."""
    a, b = (
        Directory("A", [far("door", "C", 1), far("lamp", "A")]),
        Directory("B", [far("door", "C", 1), far("fridge", "B")]),
    )
    for _ in range(4):
        a, b = merged("A", [seen("lamp")], {"B": b}, 4), merged("B", [seen("fridge")], {"A": a}, 4)
    assert not [device for device in (*a.devices, *b.devices) if device.cluster == "C"]


@given(
    devices=st.lists(
        st.builds(
            far,
            st.sampled_from(["lamp", "fridge", "door"]),
            st.sampled_from(["A", "B", "C"]),
            st.integers(0, 4),
            st.sampled_from([LAMP, FRIDGE]),
        ),
        max_size=20,
    ),
    most=st.integers(0, 4),
)
def test_whatever_neighbours_tell_the_result_is_one_that_may_be_sent(devices: list[Known], most: int) -> None:
    told = merged("A", [seen("lamp")], {"B": Directory("B", devices)}, most)
    assert decode_directory(encode_directory(told)) == told
    assert max(device.hops for device in told.devices) <= max(most, 0)
    places = [(device.cluster, device.name) for device in told.devices]
    assert len(places) == len(set(places))


def test_routes_lead_to_neighbours_that_reach_the_space_elsewhere() -> None:
    bus = Bus()
    listing = Listing(Cluster("home", "A"), BusTransport(bus, "edge"), 4)

    def hear(neighbour: str, *devices: Known) -> None:
        listing.heard(neighbour, Delivery("", encode_directory(Directory(neighbour, list(devices))), True))

    hear("B", far("fridge", "B"), far("door", "C", 1))
    hear("C", far("door", "C"))
    hear("D", far("lamp", "A", 1), far("shed", "E", 2))
    assert listing.routes(SPACE, 0, ["A"]) == ["B", "C"]
    assert listing.routes(SPACE, 2, ["A"]) == ["B", "C", "D"]
    assert listing.routes(SPACE, 2, ["A", "B", "E"]) == ["C"]
    assert listing.routes(SPACE, 2, ["A", "C", "E"]) == ["B"]
    assert listing.routes(b"another space...", 4, ["A"]) == []
    hear("C")
    listing.lost("B")
    assert listing.routes(SPACE, 4, ["A"]) == ["D"]
    assert listing.knows(FRIDGE)
    assert not listing.knows(LAMP)
    listing.heard("D", Delivery("", encode_directory(Directory("E", [far("x", "E")])), True))
    listing.heard("D", Delivery("", b"rubbish", True))
    assert listing.malformed == 2
    bus.close()
