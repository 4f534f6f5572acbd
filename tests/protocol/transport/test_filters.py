"""Topic matching against the specification's own words (MQTT 3.1.1, 4.7)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.transport.filters import FilterTree, check_filter, check_topic
from protocol.transport.inbox import packet_bytes


def matches(filter: str, topic: str) -> bool:
    tree: FilterTree[bool] = FilterTree()
    tree.put(filter, True)
    return any(tree.matching(topic))


@pytest.mark.parametrize(
    ("filter", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "a/b", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a/#", "a/$b", True),
    ],
)
def test_the_specifications_examples(filter: str, topic: str, expected: bool) -> None:
    check_filter(filter)
    check_topic(topic)
    assert matches(filter, topic) is expected


levels = st.lists(st.sampled_from(["a", "b", "", "$x"]), min_size=1, max_size=4)
filter_levels = st.tuples(st.lists(st.sampled_from(["a", "b", "", "+", "$x"]), max_size=4), st.booleans()).filter(
    lambda pair: bool(pair[0] or pair[1])
)


def by_the_rules(filter: list[str], topic: list[str]) -> bool:
    if topic[0].startswith("$") and filter[0] in ("+", "#"):
        return False
    if filter[-1] == "#":
        topic, filter = topic[: max(len(filter) - 1, 0)], filter[:-1]
    return len(filter) == len(topic) and all(f in ("+", t) for f, t in zip(filter, topic, strict=True))


@given(st.lists(filter_levels, max_size=6), levels)
def test_a_tree_of_filters_finds_all_that_match(filters: list[tuple[list[str], bool]], topic: list[str]) -> None:
    spelt = {"/".join([*names, "#"] if rest else names) for names, rest in filters}
    spelt.discard("")
    tree: FilterTree[str] = FilterTree()
    for filter in spelt:
        tree.put(filter, filter)
    expected = sorted(filter for filter in spelt if by_the_rules(filter.split("/"), topic))
    assert sorted(tree.matching("/".join(topic))) == expected


@pytest.mark.parametrize(("size", "expected"), [(0, 7), (122, 129), (123, 131), (16_378, 16_386), (16_379, 16_388)])
def test_the_size_of_a_packet(size: int, expected: int) -> None:
    """2 bytes of fixed header up to 127 bytes, 3 up to 16,383, then 4; 2 + 3 bytes of topic."""
    assert packet_bytes("a/b", b"x" * size, 0) == expected
    assert packet_bytes("a", b"x" * size, 1) == expected
