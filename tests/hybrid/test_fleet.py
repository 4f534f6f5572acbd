"""Two real agents, a real cloud and a real broker that comes and goes."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.agent.running import RunningAgent, running
from tests.brokers import Mosquitto, Network, mosquitto
from tools.processes import Child, start_cloud

QUESTIONS = ("Why is the sky blue?", "How do I keep bread fresh for a week?")
SECRET = "Ulrike Quastenflosser keeps 4711 marmots in Oberammergau"


@dataclass
class Fleet:
    """`first` has a cloud and the broker, `second` only the broker. What `first` sends goes through the networks."""

    first: RunningAgent
    second: RunningAgent
    broker: Mosquitto
    cloud: Child
    to_broker: Network
    to_cloud: Network


@pytest.fixture
def fleet(smollm2: Path, smollm2_q2: Path, tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        broker = stack.enter_context(Mosquitto(tmp_path / "broker"))
        cloud, port = start_cloud(str(smollm2), 1)
        stack.enter_context(cloud)
        to_broker, to_cloud = stack.enter_context(Network(broker.port)), stack.enter_context(Network(port))
        settings = {"SKERRY_MODEL_THREADS": "1", "SKERRY_CLOUD_DEADLINE_MS": "20000", "SKERRY_POLICY_THRESHOLD": "0.2"}
        settings["SKERRY_POLICY_LEARN"] = "false"  # so that both devices ask about the same steps
        agents = []
        for name, more in (
            ("first", {"SKERRY_PEERS_BROKER": to_broker.url, "SKERRY_CLOUD_URL": f"http://127.0.0.1:{to_cloud.port}"}),
            ("second", {"SKERRY_PEERS_BROKER": broker.url}),
        ):
            (tmp_path / name).mkdir()
            agent = running(smollm2_q2, tmp_path / name, settings | more | {"SKERRY_DEVICE_NAME": name})
            agents.append(stack.enter_context(agent))
        eventually(lambda: agents[0].metric("skerry_cloud_connected") == 1.0)
        eventually(lambda: all(agent.metric("skerry_peers_online") == 1.0 for agent in agents))
        yield Fleet(*agents, broker, cloud, to_broker, to_cloud)


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    pause, give_up = threading.Event(), time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, "it never came to be"
        pause.wait(0.05)


def ask(agent: RunningAgent, question: str, *, private: bool = False) -> tuple[str, dict[str, int], dict[str, object]]:
    """The answer's text, its counts by provenance, and all that the agent says of it."""
    answer = agent.client().chat.completions.create(
        model="smollm2-q2",
        messages=[{"role": "user", "content": question}],
        max_tokens=40,
        temperature=0,
        extra_body={"skerry": {"private": private}},
    )
    choice = answer.choices[0]
    told: dict[str, object] = choice.skerry  # type: ignore[attr-defined]
    counts: dict[str, int] = told["counts"]  # type: ignore[assignment]
    return choice.message.content or "", counts, told


def entries(agent: RunningAgent) -> float:
    return agent.metric("skerry_memory_entries")


def test_the_second_device_profits_from_the_firsts_answers_whatever_becomes_of_broker_and_cloud(fleet: Fleet) -> None:
    text, counts, _ = ask(fleet.first, QUESTIONS[0])
    assert counts["cloud"] > 0
    eventually(lambda: entries(fleet.second) == entries(fleet.first) > 0)
    same_text, counts, told = ask(fleet.second, QUESTIONS[0])
    assert counts["cloud"] == told["llm_tokens"] == 0
    assert counts["memory"] > 0
    assert told["borrowed"] == counts["memory"] + counts["peer"]
    assert same_text == text, "where all is known, the second device writes what the first one wrote with help"

    fleet.broker.kill()
    fleet.cloud.kill()
    eventually(lambda: all(a.metric("skerry_broker_connected") == 0.0 for a in (fleet.first, fleet.second)))
    for agent in (fleet.first, fleet.second):
        text_alone, counts, told = ask(agent, QUESTIONS[0])
        assert text_alone == text
        assert counts["memory"] > 0
        assert told["llm_tokens"] == 0


@pytest.mark.parametrize("persistence", [True, False])
def test_what_is_learned_while_the_broker_is_gone_arrives_when_it_is_back(fleet: Fleet, persistence: bool) -> None:
    fleet.broker.kill()
    eventually(lambda: fleet.first.metric("skerry_broker_connected") == 0.0)
    _, counts, _ = ask(fleet.first, QUESTIONS[1])
    assert counts["cloud"] > 0
    assert entries(fleet.second) == 0
    fleet.broker.restart(persistence=persistence)
    if persistence:
        eventually(lambda: entries(fleet.second) == entries(fleet.first) > 0)
    else:  # who was not back yet has missed the news, and has to ask
        eventually(lambda: all(a.metric("skerry_broker_connected") == 1.0 for a in (fleet.first, fleet.second)))
    _, counts, _ = ask(fleet.second, QUESTIONS[1])
    assert counts["memory"] + counts["peer"] > 0


def test_a_frozen_network_delays_gossip_and_nothing_else(fleet: Fleet) -> None:
    fleet.to_broker.freeze()
    _, counts, _ = ask(fleet.first, QUESTIONS[0])
    assert counts["cloud"] > 0
    fleet.to_broker.drop()
    fleet.to_broker.well()
    eventually(lambda: entries(fleet.second) == entries(fleet.first) > 0)


def test_rubbish_on_every_topic_is_counted_and_dropped(fleet: Fleet) -> None:
    ask(fleet.first, QUESTIONS[0])
    eventually(lambda: entries(fleet.second) == entries(fleet.first) > 0)
    before, dice = entries(fleet.second), random.Random(5)
    base = "skerry/1/home/main"
    kinds = ("status", "directory", "memory/new", "memory/ask/second", "memory/ask/first", "memory/answer/second", "x")
    topics = [f"{base}/{who}/{kind}" for who in ("first", "second", "stranger", "edge") for kind in kinds]
    for topic in topics:
        for size in (0, 1, 30, 3000, 300_000):
            publish(fleet.broker, topic, dice.randbytes(size), retain=topic.endswith(("status", "directory")))
    publish(fleet.broker, f"{base}/first/memory/new", b"\x92\x01\x91" + b"\x99" + b"\xc0" * 9)
    eventually(lambda: fleet.second.metric("skerry_peer_entries_total", verdict="malformed") > 3)
    assert entries(fleet.second) == before
    _, counts, _ = ask(fleet.second, QUESTIONS[0])
    assert counts["memory"] > 0
    for agent in (fleet.first, fleet.second):
        assert agent.call("GET", "/ready").status == 200
    eventually(lambda: all(a.metric("skerry_peers_online") == 1.0 for a in (fleet.first, fleet.second)))
    before = entries(fleet.first)
    ask(fleet.first, QUESTIONS[1])
    eventually(lambda: entries(fleet.second) == entries(fleet.first) > before)


def publish(broker: Mosquitto, topic: str, payload: bytes, *, retain: bool = False) -> None:
    program, env = mosquitto()
    command = [program.removesuffix("mosquitto") + "mosquitto_pub"]
    if "/sbin/" in command[0]:
        command = [command[0].replace("/sbin/", "/bin/")]
    options = ["-p", str(broker.port), "-t", topic, "-s" if payload else "-n", *(["-r"] if retain else [])]
    subprocess.run([*command, *options], input=payload, env=env, check=True, timeout=30)


def test_nothing_of_a_private_request_leaves_the_device(fleet: Fleet) -> None:
    """Searched in every byte that went out, the cloud's frames unmasked; its tokens' keys are not among them either."""
    ask(fleet.first, QUESTIONS[0])
    eventually(lambda: entries(fleet.second) == entries(fleet.first) > 0)
    asked = fleet.first.metric("skerry_peer_questions_total", outcome="asked")
    shared, known = fleet.first.metric("skerry_gossip_sent_total"), entries(fleet.first)
    text, counts, _ = ask(fleet.first, f"{SECRET}. Write a letter about it.", private=True)
    assert counts["cloud"] == counts["peer"] == 0
    assert fleet.first.metric("skerry_uncertainty_count") > 40
    # What is sent after it is sent behind it: nothing of it can still be on its way.
    ask(fleet.first, QUESTIONS[1])
    eventually(lambda: entries(fleet.second) == entries(fleet.first) > known)
    sent = bytes(fleet.to_broker.passed) + unmasked(bytes(fleet.to_cloud.passed))
    assert QUESTIONS[0].encode() in sent, "what is not private is seen here"
    for word in [word for word in f"{SECRET} {text}".split() if len(word) > 9]:
        assert word.encode() not in sent
    gained = entries(fleet.first) - known
    assert fleet.first.metric("skerry_gossip_sent_total") - shared == gained, "no key of a private step was shared"
    assert fleet.first.metric("skerry_peer_questions_total", outcome="asked") - asked <= gained + counts["memory"] + 40


def unmasked(sent: bytes) -> bytes:
    """The payloads of a client's WebSocket frames (RFC 6455, section 5.2), one connection after another."""
    text, at = bytearray(), 0
    while (start := sent.find(b"\r\n\r\n", at)) >= 0:
        at = start + 4
        while at + 6 <= len(sent) and not sent.startswith(b"GET ", at):
            size, at = sent[at + 1] & 127, at + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                size, at = int.from_bytes(sent[at : at + width], "big"), at + width
            mask, at = sent[at : at + 4], at + 4
            text += bytes(byte ^ mask[index % 4] for index, byte in enumerate(sent[at : at + size]))
            at += size
    return bytes(text)
