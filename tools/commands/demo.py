"""`skerry demo`: the main job on real models: help from a cloud, two devices that share what they learn, outages."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
from msgspec.structs import replace

from agent.agent import Account, Request
from agent.config import AgentConfig
from agent.device import Device
from models.engine.threads import physical_cores
from models.store import Places
from protocol.errors import LinkError
from protocol.resolve import Message
from tools import show
from tools.commands.ask import running
from tools.fetch import model_file
from tools.processes import Child, start_broker, start_cloud

QUESTIONS = (
    "How do I keep bread fresh for a week?",
    "Write one sentence about the sea.",
)
_PATIENCE = 60.0
_WHO = ("local", "memory", "peer", "cloud", "fallback")  # columns of the table at the end


@click.command(epilog="Example: skerry demo --cloud-model qwen2.5-coder-1.5b")
@click.option("--model", default="smollm2-135m", show_default=True, help="the devices' model")
@click.option("--cloud-model", default="qwen2.5-coder-0.5b", show_default=True, help="the cloud's model")
@click.option("--tokens", type=click.IntRange(8), default=64, show_default=True, help="per answer")
def demo(model: str, cloud_model: str, tokens: int) -> None:
    """Two devices, a broker and a cloud on this machine: one learns, the other knows, then everything else goes."""
    places = Places.of(os.environ)
    for name in (model, cloud_model):
        model_file(name, places)
    threads = max(1, physical_cores() // 2)  # each of the two processes gets its share of the cores
    _say(f"Starting the cloud ({cloud_model}) and a broker …")
    with tempfile.TemporaryDirectory(prefix="skerry-demo-") as folder:
        broker, broker_port = start_broker()
        with broker:
            cloud, cloud_port = start_cloud(cloud_model, threads)
            with cloud:
                config = AgentConfig()
                config = replace(
                    config,
                    policy=replace(config.policy, learn=False, audit=0.0),  # the same tokens each time
                    model=replace(config.model, name=model, threads=threads, sequences=1, context=1024),
                    cloud=replace(config.cloud, deadline_ms=2000),
                    peers=replace(config.peers, broker=f"mqtt://127.0.0.1:{broker_port}"),
                )
                scenes = _Scenes(config, Path(folder), cloud, cloud_port, broker, tokens)
                rows = asyncio.run(scenes.play())
    _table(rows)


class _Scenes:
    def __init__(
        self, config: AgentConfig, folder: Path, cloud: Child, cloud_port: int, broker: Child, tokens: int
    ) -> None:
        self._config = config
        self._folder = folder
        self._cloud = cloud
        self._cloud_url = f"http://127.0.0.1:{cloud_port}"
        self._broker = broker
        self._tokens = tokens
        self._rows: list[tuple[str, Account]] = []

    async def play(self) -> list[tuple[str, Account]]:
        async with running(self._device("harbour", self._cloud_url)) as harbour:
            async with running(self._device("lighthouse", "")) as lighthouse:
                await self._meet(harbour, lighthouse)
                click.echo(f"Each token is coloured by who wrote it: {show.legend()}\n")
                _say("`harbour` has a cloud to ask:")
                for question in QUESTIONS:
                    await self._ask(harbour, "harbour", question)
                await _until(lambda: _entries(lighthouse) >= _entries(harbour), "the entries reach the other device")
                _say(f"`lighthouse` has no cloud, but has heard of {_entries(lighthouse)} tokens from `harbour`:")
                for question in QUESTIONS:
                    await self._ask(lighthouse, "lighthouse", question)
                _say("Taking cloud and broker away (kill -9) …")
                self._cloud.kill()
                self._broker.kill()
                await self._ask(lighthouse, "alone", QUESTIONS[0])
                await self._ask(harbour, "alone too", QUESTIONS[1])
        return self._rows

    def _device(self, name: str, cloud: str) -> AgentConfig:
        config = self._config
        return replace(
            config,
            device=replace(config.device, name=name, folder=str(self._folder / name)),
            cloud=replace(config.cloud, url=cloud),
        )

    async def _meet(self, harbour: Device, lighthouse: Device) -> None:
        """What is learned goes to devices that are known to want it."""
        assert harbour.cloud is not None
        if not await harbour.cloud.connected(_PATIENCE):
            raise LinkError(f"the demo's own cloud does not answer: {harbour.cloud.state}")
        both = (harbour, lighthouse)
        await _until(lambda: all(_has_company(device) for device in both), "the two devices know of each other")

    async def _ask(self, device: Device, scene: str, question: str) -> None:
        click.echo(click.style(f"> {question}", bold=True))
        async for event in device.agent.stream(Request([Message("user", question)], max_tokens=self._tokens)):
            if isinstance(event, Account):
                click.echo("\n" + click.style(show.summary(event), dim=True) + "\n")
                self._rows.append((scene, event))
                return
            click.echo(show.coloured(event), nl=False)
            sys.stdout.flush()


def _has_company(device: Device) -> bool:
    assert device.keeper is not None
    assert device.network is not None
    return bool(device.network.around.holders(device.keeper.keys.space))


def _entries(device: Device) -> int:
    assert device.keeper is not None
    return device.keeper.memory.stats().entries


async def _until(holds: Callable[[], bool], what: str) -> None:
    """Raises LinkError if it does not hold within a minute."""
    give_up = time.monotonic() + _PATIENCE
    while not holds():
        if time.monotonic() > give_up:
            raise LinkError(f"waited in vain until {what}")
        await asyncio.sleep(0.05)


def _table(rows: list[tuple[str, Account]]) -> None:
    heads = ("", *_WHO, "LLM saved", "bytes up", "bytes down", "tok/s")
    click.echo(f"{heads[0]:<11}" + "".join(f"{head:>11}" for head in heads[1:]))
    for name, account in rows:
        counts = account.counts
        saved = 1 - account.llm_tokens / max(1, account.tokens)
        up, down = account.bytes_up + account.peer_bytes_up, account.bytes_down + account.peer_bytes_down
        click.echo(
            f"{name:<11}"
            + "".join(f"{counts[who]:>11}" for who in _WHO)
            + f"{saved:>11.0%}{up:>11}{down:>11}{account.tok_s:>11.1f}"
        )


def _say(text: str) -> None:
    click.echo(click.style(text, fg="magenta"))
