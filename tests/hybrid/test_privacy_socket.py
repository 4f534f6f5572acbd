"""At the socket: nothing private leaves a device that hides it, and all of it one that does not look for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

import agent.assemble
from agent.agent import Account, Agent, Piece, Request
from agent.config import AgentConfig, Model
from agent.device import Device
from agent.policy import ThresholdPolicy
from protocol.config import load
from protocol.resolve import Message
from tests.brokers import Mosquitto, Network
from tests.hybrid.outgoing import forms, frames, heard, told
from tests.hybrid.parrot import Parrot
from tests.hybrid.test_rounds import Edge
from tools.processes import start_cloud

PRIVATE = {
    "name": "Zoë Grünwald-Okafor",
    "email": "zoe.gruenwald@klinik-nord.example.org",
    "phone": "+49 30 9018 2046",
    "iban": "DE89 3704 0044 0532 0130 00",
    "card": "4556 7375 8689 9855",
    "id": "123-45-6789",
    "birth": "12 March 1984",
    "address": "17 Kestrel Gardens, Norwich NR1 3QD",
    "secret": "quasar-Lemming77",
    "ip": "203.0.113.77",
    "mac": "3c:22:fb:a1:b2:c3",
    "url": "https://zgw:tr0ub4dor@files.example.net/x",
}
CHAT = [
    Message("system", f"You help {PRIVATE['email']}. Host {PRIVATE['ip']}, MAC {PRIVATE['mac']}."),
    Message("user", f"My name is {PRIVATE['name']}. Call me at {PRIVATE['phone']}, or wire it to {PRIVATE['iban']}."),
    Message("assistant", f"Hello {PRIVATE['name']}! I noted {PRIVATE['phone']}."),
    Message(
        "user",
        f"My card is {PRIVATE['card']}, SSN {PRIVATE['id']}. I was born on {PRIVATE['birth']} and live at "
        f"{PRIVATE['address']}. Password: {PRIVATE['secret']}. See {PRIVATE['url']}\nRepeat it all, please.",
    ),
]
ECHO = "The letter says so: " + " or ".join(PRIVATE.values()) + " and that is all of it."
OPEN = "Make an address book entry, please."
OWN = "Of course: mira.voss@example.com is what it says, or phone +44 20 7946 0123 at work, and nothing else is known."
OWN_PRIVATE = ("mira.voss@example.com", "+44 20 7946 0123")
CUT = "My new bank card has the number 4556 7375 86"
REST = "89 9855 and I keep it in the drawer."
CLEAN = "Why is the sky blue?"


@dataclass
class World:
    device: Device
    to_cloud: Network
    to_broker: Network
    everything: bytearray  # that the broker passed on to anybody
    edge: Edge

    async def ask(self, prompt: list[Message] | str, tokens: int = 40, **more: Any) -> tuple[str, Account]:
        text = ""
        async for event in self.device.agent.stream(Request(prompt, max_tokens=tokens, **more)):
            if isinstance(event, Account):
                return text, event
            assert isinstance(event, Piece)
            text += event.text
        raise AssertionError

    async def sent(self) -> list[bytes]:
        """All payloads so far: those of the WebSocket, all to the broker, and all that the broker passed on. What is
        sent last is sent behind everything else."""
        await self.ask(CLEAN, tokens=4)
        return [*frames(bytes(self.to_cloud.passed)), bytes(self.to_broker.passed), bytes(self.everything)]

    def texts(self) -> list[str]:
        return heard(list(frames(bytes(self.to_cloud.passed))), self.device.agent.engine.tokenizer)


def listen(port: int, everything: bytearray) -> paho.Client:
    subscribed = threading.Event()
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = lambda _client, _data, message: everything.extend(message.topic.encode() + message.payload)
    client.connect("127.0.0.1", port)
    client.subscribe("#")
    client.loop_start()
    assert subscribed.wait(30)
    return client


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)


def configured(folder: Path, **settings: str) -> AgentConfig:
    usual = {
        "model_threads": "1",
        "device_folder": str(folder),
        "policy_threshold": "0.2",
        "cloud_deadline_ms": "20000",
    }
    usual |= {"cloud_mode": "fuse", "cloud_weight": "1.0", "policy_learn": "true", "policy_audit": "0"}
    return load(AgentConfig, None, {f"SKERRY_{name}".upper(): value for name, value in (usual | settings).items()})


@asynccontextmanager
async def world(
    folder: Path, model: Path, llm: Path, monkeypatch: pytest.MonkeyPatch, detect: str, *, bytewise: bool = False
) -> AsyncIterator[World]:
    """One device that is watched, a second one that is its peer, a cloud, a broker and an edge."""
    everything = bytearray()
    with ExitStack() as stack:
        broker = stack.enter_context(Mosquitto(folder / "broker"))
        cloud, port = start_cloud(str(llm), 1)
        stack.enter_context(cloud)
        to_broker, to_cloud = stack.enter_context(Network(broker.port)), stack.enter_context(Network(port))
        ears = listen(broker.port, everything)
        stack.callback(ears.loop_stop)
        edge = Edge(broker, folder)
        stack.callback(edge.process.wait, 30)
        stack.callback(edge.process.terminate)
        peer = agent.assemble.assemble(
            configured(folder / "peer", peers_broker=broker.url, device_name="second"), model
        )
        stack.callback(peer.close)
        monkeypatch.setattr(agent.assemble, "open_model", parrot)
        config = configured(
            folder / "own",
            cloud_url=f"http://127.0.0.1:{to_cloud.port}",
            peers_broker=to_broker.url,
            device_name="first",
            privacy_detect=detect,
        )
        device = agent.assemble.assemble(config, model)
        stack.callback(device.close)
        assert device.cloud is not None
        assert device.network is not None
        # It learns and takes part in rounds, but asks about every token all the same.
        device.agent.options = replace(device.agent.options, policy=ThresholdPolicy(0.0))
        if bytewise:
            device.cloud.fingerprint = "another tokenizer"
        async with peer.linked(), device.linked():
            assert await device.cloud.connected(30)
            network = device.network
            await eventually(lambda: len(network.around.holders(device.keeper.keys.space)) == 1)  # type: ignore[union-attr]
            yield World(device, to_cloud, to_broker, everything, edge)


def parrot(model: Model, path: Path, *, hidden: bool) -> Parrot:
    return Parrot(path, context=model.context, sequences=model.sequences, threads=model.threads, hidden=hidden)


LINES = {"Repeat it all, please.": ECHO, OPEN: OWN, CUT: REST}


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parrot, "lines", LINES)


def found(payloads: list[bytes], private: str, agent: Agent) -> bool:
    return any(form in payload for form in forms(private, agent.engine.tokenizer) for payload in payloads)


@pytest.mark.parametrize("bytewise", [False, True], ids=["token ids", "bytes"])
def test_nothing_private_leaves_a_device_that_redacts(
    tmp_path: Path, smollm2: Path, smollm2_q2: Path, monkeypatch: pytest.MonkeyPatch, bytewise: bool
) -> None:
    async def run() -> None:
        async with world(tmp_path, smollm2_q2, smollm2, monkeypatch, "redact", bytewise=bytewise) as at:
            agent, network, keeper = at.device.agent, at.device.network, at.device.keeper
            assert network is not None
            assert keeper is not None
            _, clean = await at.ask([Message("user", CLEAN)], tokens=12)
            assert clean.privacy == "free"
            assert clean.peer_bytes_up > 0
            await eventually(lambda: network.gossip.sent > 0)
            kept = keeper.memory.stats().entries

            text, account = await at.ask(CHAT, tokens=400)
            assert text == ECHO, "the reader gets what the SLM wrote"
            assert account.privacy == "redacted"
            assert account.asked > 10, "help goes on, about what is not private"
            assert account.peer_bytes_up == 0
            text, account = await at.ask(CUT, tokens=60)
            assert text == REST
            assert account.privacy == "redacted"
            assert keeper.memory.stats().entries == kept, "what peers could be told of"
            text, account = await at.ask([Message("user", OPEN)], tokens=200)
            assert text == OWN
            assert account.privacy == "redacted"

            at.edge.tell("round")
            payloads, texts = await at.sent(), at.texts()
            assert any("[NAME_1]" in text for text in texts)
            assert any("[PHONE_1] at work" in text for text in texts), "asked on behind what was hidden"
            assert found(payloads, CLEAN, agent), "what is not private is seen here"
            for private in (*PRIVATE.values(), *OWN_PRIVATE):
                assert not found(payloads, private, agent), private
                assert not told(texts, private), private
            assert not told(texts, CUT[-10:] + REST[:7])

    asyncio.run(run())


def test_the_same_is_seen_to_leave_a_device_that_does_not_look(
    tmp_path: Path, smollm2: Path, smollm2_q2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with world(tmp_path, smollm2_q2, smollm2, monkeypatch, "off") as at:
            _, account = await at.ask(CHAT, tokens=400)
            assert account.privacy == "free"
            payloads, texts = await at.sent(), at.texts()
            for private in PRIVATE.values():
                assert found(payloads, private, at.device.agent), private
                assert told(texts, private), private
            assert any(ECHO[:-30] in text for text in texts), "the answer is put together from token ids"

    asyncio.run(run())


def test_a_device_that_keeps_it_to_itself_asks_nobody(
    tmp_path: Path, smollm2: Path, smollm2_q2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with world(tmp_path, smollm2_q2, smollm2, monkeypatch, "local") as at:
            before = len(at.to_cloud.passed)
            text, account = await at.ask(CHAT, tokens=400)
            assert text == ECHO
            assert account.privacy == "local"
            assert account.asked == account.bytes_up == account.peer_bytes_up == 0
            assert not list(frames(bytes(at.to_cloud.passed[before:])))
            text, account = await at.ask([Message("user", OPEN)], tokens=200)
            assert text == OWN
            assert account.asked > 0, "up to what is private"
            payloads, texts = await at.sent(), at.texts()
            for private in (*PRIVATE.values(), *OWN_PRIVATE):
                assert not found(payloads, private, at.device.agent), private
                assert not told(texts, private), private
            assert not any("at work" in text for text in texts), "nobody is asked behind it"

    asyncio.run(run())
