"""Topics: one table, names that can be part of them, and who may be believed to have sent something."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigError
from protocol.topics import ANSWER, ASK, DIRECTORY, NEWS, STATUS, TABLE, Cluster, device_name, is_edge
from protocol.transport.filters import check_filter, check_topic

A = Cluster("home", "A")
levels = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True)


@pytest.mark.parametrize(
    ("kind", "topic"),
    [
        (STATUS, "skerry/1/home/A/lamp/status"),
        (NEWS, "skerry/1/home/A/lamp/memory/new"),
        (ASK, "skerry/1/home/A/lamp/memory/ask/fridge"),
        (ANSWER, "skerry/1/home/A/lamp/memory/answer/fridge"),
        (DIRECTORY, "skerry/1/home/A/lamp/directory"),
    ],
)
def test_every_topic_is_under_its_senders_level(kind: object, topic: str) -> None:
    assert A.path(kind, "lamp", "fridge") == topic  # type: ignore[arg-type]
    assert A.sender(topic) == "lamp"


def test_a_device_hears_what_is_meant_for_it_and_no_other_questions() -> None:
    assert A.path(ASK, other="lamp") == "skerry/1/home/A/+/memory/ask/lamp"
    assert A.path(NEWS) == "skerry/1/home/A/+/memory/new"


@given(fleet=levels, cluster=levels, device=levels, other=levels)
def test_whatever_the_names_topics_are_valid_and_lead_back_to_their_sender(
    fleet: str, cluster: str, device: str, other: str
) -> None:
    place = Cluster(fleet, cluster)
    for kind in TABLE:
        check_topic(place.path(kind, device, other))
        check_filter(place.path(kind))
        assert place.sender(place.path(kind, device, other)) == device


@given(st.text(max_size=80))
def test_any_text_is_a_sender_or_none(topic: str) -> None:
    assert A.sender(topic) is None
    found = A.sender(f"skerry/1/home/A/{topic}")
    assert found is None or topic.split("/")[0] == found


@pytest.mark.parametrize("topic", ["skerry/1/home/B/lamp/status", "skerry/2/home/A/lamp/status", "$SYS/broker", ""])
def test_other_clusters_fleets_and_versions_have_no_sender_here(topic: str) -> None:
    assert A.sender(topic) is None


@pytest.mark.parametrize("name", ["", "a/b", "a+b", "#", "x" * 65, "tür", "a b", "a\n"])
def test_what_cannot_be_a_level_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a topic"):
        device_name(name)
    with pytest.raises(ConfigError, match="cannot be part of a topic"):
        Cluster(name, "A")
    with pytest.raises(ConfigError, match="cannot be part of a topic"):
        Cluster("home", name)


@pytest.mark.parametrize("name", ["edge", "edge.B", "coordinator"])
def test_the_services_names_are_not_for_devices(name: str) -> None:
    assert is_edge(name) or name == "coordinator"
    with pytest.raises(ConfigError, match="reserved"):
        device_name(name)


def test_names_that_only_look_like_the_edges_are_allowed() -> None:
    assert device_name("edge-2") == "edge-2"
    assert not is_edge("edgeless")


def test_only_what_would_be_wrong_later_is_not_retained() -> None:
    states = {"Status", "Directory", "Call", "Agreed", "Report", "Overall", "AdapterCall", "AdapterAgreed"}
    assert {kind.message for kind in TABLE if kind.retained} == states
    assert {kind.message for kind in TABLE if kind.qos == 0} == {"Ask", "Answer"}
