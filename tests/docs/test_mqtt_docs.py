"""docs/mqtt.md says what the code does."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from agent.peers.answer import AnswerLimits
from agent.peers.intake import IntakeLimits, Verdict
from agent.peers.resolver import AskOptions
from agent.peers.reunion import SECONDS
from agent.peers.sharing import GossipLimits
from agent.peers.trust import Trust
from protocol import adapters, memory, peers, presence, rounds, secure
from protocol.topics import TABLE
from server.edge import adapter_desk
from server.edge.admission import REASONS
from server.edge.blobs import BlobLimits
from server.edge.bridge import BridgeLimits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/mqtt.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
MESSAGES: list[type[msgspec.Struct]] = [
    presence.Status,
    peers.News,
    peers.Ask,
    peers.Answer,
    peers.Directory,
    memory.Entry,
    rounds.Call,
    rounds.Update,
    rounds.Agreed,
    rounds.Report,
    rounds.Overall,
    adapters.AdapterCall,
    adapters.AdapterOffer,
    adapters.AdapterAgreed,
]
PARTS = {  # described after the message that they are in
    "Directory": [peers.Known],
    "Agreed": [rounds.Learned],
    "Report": [rounds.Told],
    "Overall": [rounds.Whole, rounds.Level, rounds.Group],
    "AdapterAgreed": [adapters.AdapterGroup, adapters.Blob],
}


def rows(text: str) -> list[list[str]]:
    """The first table of the text, without its head."""
    found = re.search(r"^\|.*\n\|[-| ]+\n((?:\|.*\n)*)", text, re.MULTILINE)
    assert found
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def section(title: str) -> str:
    return re.split(rf"^##+ {title}\n", PAGE, flags=re.MULTILINE)[1]


def test_the_table_of_topics_is_the_codes() -> None:
    assert rows(section("Topics")) == [
        [
            f"`{kind.pattern}`",
            kind.sender,
            kind.receiver,
            f"`{kind.message}`",
            kind.encoding,
            str(kind.qos),
            "yes" if kind.retained else "no",
            f"{kind.limit >> 10} KiB",
            kind.meaning,
        ]
        for kind in TABLE
    ]


def test_every_message_of_the_table_is_described() -> None:
    assert {kind.message for kind in TABLE} | {"Entry"} == {message.__name__ for message in MESSAGES} | {"Secure"}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_fields_are_those_of_the_message_in_their_order(message: type[msgspec.Struct]) -> None:
    assert [row[0] for row in rows(section(message.__name__))] == [f"`{name}`" for name in message.__struct_fields__]


@pytest.mark.parametrize(("title", "part"), [(title, part) for title, parts in PARTS.items() for part in parts])
def test_fields_of_what_is_in_a_message(title: str, part: type[msgspec.Struct]) -> None:
    table = rows(section(title).partition(f"Each `{part.__name__}`")[2])
    assert [row[0] for row in table] == [f"`{name}`" for name in part.__struct_fields__]


def test_every_step_of_a_secure_round_is_described() -> None:
    table = rows(section("Secure"))
    steps = get_args(secure.Message)
    assert {row[0] for row in table} == {f"`{step.__name__}`" for step in steps}
    for step in steps:
        [title] = [title for title in re.findall(r"^#### (.*)$", PAGE, re.MULTILINE) if step.__name__ in title]
        told = {row[0] for row in rows(re.split(rf"^#### {title}\n", PAGE, flags=re.MULTILINE)[1])}
        assert {f"`{name}`" for name in step.__struct_fields__} - {"`version`"} <= told


def test_the_version_is_the_codes() -> None:
    assert peers.VERSION == presence.VERSION == rounds.VERSION == secure.VERSION == adapters.VERSION == 1
    assert "1 at present" in WORDS


@pytest.mark.parametrize(
    ("title", "field", "words"),
    [
        ("Status", "spaces", f"at most {presence.MAX_SPACES}"),
        ("News", "entries", f"1 to {peers.MAX_NEWS}"),
        ("Ask", "key", f"1 to {memory.MAX_KEY_BYTES} bytes"),
        ("Ask", "space", f"{memory.SPACE_BYTES} bytes"),
        ("Ask", "hops", f"0 to {peers.MAX_HOPS}"),
        ("Ask", "visited", f"at most {peers.MAX_VISITED}"),
        ("Answer", "entries", f"0 to {peers.MAX_ANSWER}"),
        ("Directory", "devices", f"at most {peers.MAX_DEVICES}"),
        ("Agreed", "subjects", f"at most {rounds.MAX_SUBJECTS}"),
        ("AdapterAgreed", "groups", f"at most {adapters.MAX_GROUPS}"),
        ("AdapterOffer", "rank", f"1 to {adapters.MAX_RANK}"),
        ("AdapterOffer", "lessons", f"1 to {adapters.MAX_LESSONS}"),
        ("Entry", "key", f"1 to {memory.MAX_KEY_BYTES} bytes"),
        ("Entry", "tail", f"{memory.TAIL_BYTES} bytes"),
        ("Entry", "token", f"0 to {memory.MAX_TOKEN}"),
        ("Entry", "count", f"1 to {memory.MAX_COUNT}"),
        ("Entry", "time", f"0 to 2^{int(math.log2(memory.MAX_TIME))}"),
        ("Entry", "origin", f"{memory.ORIGIN_BYTES} bytes"),
        ("Entry", "signature", f"{memory.SIGNATURE_BYTES} bytes"),
    ],
)
def test_bounds_of_fields(title: str, field: str, words: str) -> None:
    types = {row[0]: row[1] for row in rows(section(title))}
    assert words in types[f"`{field}`"]


def test_rates_and_sizes_in_the_text() -> None:
    gossip, intake, asking, answering, edge = (
        GossipLimits(),
        IntakeLimits(),
        AskOptions(),
        AnswerLimits(),
        BridgeLimits(),
    )
    assert gossip.pause == 0.25
    for words in (
        f"up to {gossip.batch} entries in a message, after a quarter of a second",
        f"at most {gossip.per_second >> 10} KiB a second and {gossip.per_hour >> 20} MiB an hour",
        f"{SECONDS:.0f} seconds at most",
        f"up to {intake.held >> 10} KiB",
        f"{intake.sender_rate:.0f} entries a second ({intake.sender_burst} at once)",
        f"of its own news {intake.news_rate:.0f} ({intake.news_burst} at once)",
        f"believed {presence.NEW_KEYS} new keys a day",
        f"asks up to {asking.at_once} others",
        f"{asking.floor * 1000:.0f} ms and `peers.deadline_ms`",
        f"{answering.asker_rate:.0f} questions a second of one asker ({answering.asker_burst} at once)",
        f"{answering.rate:.0f} in all ({answering.burst} at once)",
        f"at most {edge.hops} clusters far (its `hops`, never more than {peers.MAX_HOPS})",
        f"{edge.device_rate:.0f} questions a second of one device ({edge.device_burst} at once)",
        f"{edge.neighbour_rate:.0f} of one neighbour ({edge.neighbour_burst} at once)",
        f"{edge.rate:.0f} in all ({edge.burst} at once)",
    ):
        assert words in WORDS


def test_every_reason_for_refusing_is_named() -> None:
    assert all(f"`{verdict}`" in PAGE for verdict in Verdict)
    assert rows(section("Rounds")) == [[f"`{reason}`", meaning] for reason, meaning in REASONS.items()]
    reasons = rows(section("Rounds of adapters").partition("Offers and uploads are refused")[2])
    assert reasons == [[f"`{reason}`", meaning] for reason, meaning in adapter_desk.REASONS.items()]
    limits = BlobLimits()
    assert f"({limits.silence_s:.0f} seconds of silence, or {limits.longest_s:.0f} in all" in WORDS
    assert f"({limits.uploads} uploads, {limits.downloads} downloads)" in WORDS


@pytest.mark.parametrize("bound", [0.01, 0.1, 0.33])
def test_the_bound_on_audits(bound: float) -> None:
    assert Trust(b"", bound=bound, base=0.05).audits_to_quarantine == 10
    assert "= 10 audits (for b up to 1/3)" in WORDS


def test_what_is_signed_is_what_is_written() -> None:
    entry = memory.Entry(b"s" * 16, b"key", b"t" * 8, 1, 0.5, 2, 3, b"o" * 32)
    assert memory.signed_body(entry) == (
        b"skerry/1/entry\0"
        + b"s" * 16
        + b"t" * 8
        + (1).to_bytes(4, "big")
        + b"\x3f\xe0\0\0\0\0\0\0"
        + (2).to_bytes(4, "big")
        + (3).to_bytes(8, "big")
        + b"o" * 32
        + b"key"
    )


def test_the_brokers_access_list_is_the_one_described() -> None:
    rule = "pattern write skerry/1/+/+/%u/#"
    assert rule in (ROOT / "deploy/mosquitto/acl").read_text()
    assert rule in PAGE
