"""`skerry ask`: one question, answered in this process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from agent.agent import Account, Piece, Request, random_seed
from agent.config import AgentConfig
from agent.device import Device
from protocol.resolve import Message, Mode, Sampling
from tools import show
from tools.device import opened
from tools.settings import configuration, over

_CONNECT_SECONDS = 1.0  # the answer does not wait longer than this for a cloud that may not be there


@click.command(epilog='Example: skerry ask "Why is the sky blue?" --cloud http://127.0.0.1:8431 --explain')
@click.argument("question")
@click.option("--config", type=click.Path(path_type=Path), help="the agent's TOML file")
@click.option("--model", help="catalog id, path of a GGUF file or of a folder with an ONNX model")
@click.option("--cloud", help="URL of `skerry serve`")
@click.option("--broker", help="MQTT broker of the peers, mqtt://host:1883")
@click.option("--threshold", type=click.FloatRange(0, 1), help="ask for help when u is above it")
@click.option("--mode", type=click.Choice(["verify", "fuse", "take"]), help="what a reply does")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="the same seed gives the same text")
@click.option("--threads", type=click.IntRange(0), help="most threads to use")
@click.option("--private", is_flag=True, help="nothing of this question leaves the device")
@click.option("--offline", is_flag=True, help="ask nobody for help; the own memory remains")
@click.option("--explain", is_flag=True, help="a table: token, u, who, probability, wait")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of the stream")
def ask(
    question: str,
    config: Path | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    private: bool,
    offline: bool,
    explain: bool,
    as_json: bool,
    **overrides: Any,
) -> None:
    """Answer QUESTION, streaming, coloured by who wrote each token."""
    settings = _override(configuration(AgentConfig, "agent", config, os.environ), offline=offline, **overrides)
    sampling = Sampling(temperature=temperature, seed=random_seed() if seed is None else seed)
    if not question.strip():
        raise click.UsageError("the question is empty")
    question = question.encode("utf-8", "replace").decode()  # what the shell passed need not be UTF-8
    request = Request([Message("user", question)], max_tokens=max_tokens, sampling=sampling, private=private)
    pieces, account = asyncio.run(_answer(settings, request, quiet=as_json))
    if as_json:
        click.echo(json.dumps(show.as_json(account, pieces), ensure_ascii=False))
        return
    click.echo()
    if explain:
        click.echo("\n" + show.explained(pieces))
    click.echo(click.style(show.summary(account), dim=True))


def _override(
    config: AgentConfig,
    *,
    offline: bool,
    model: str | None,
    cloud: str | None,
    broker: str | None,
    threshold: float | None,
    mode: Mode | None,
    threads: int | None,
) -> AgentConfig:
    """The configuration with the command line laid over it."""

    return msgspec.structs.replace(
        config,
        model=over(config.model, name=model, threads=threads, sequences=1),
        policy=over(config.policy, threshold=threshold, learn=None if threshold is None else False),
        cloud=over(config.cloud, url="" if offline else cloud, mode=mode),
        peers=over(config.peers, broker="" if offline else broker),
    )


async def _answer(config: AgentConfig, request: Request, *, quiet: bool) -> tuple[list[Piece], Account]:
    pieces: list[Piece] = []
    async with running(config) as device:
        agent, cloud = device.agent, device.cloud
        if cloud is not None and not request.private and not await cloud.connected(_CONNECT_SECONDS):
            click.echo(click.style(f"(no help from the cloud: {cloud.state})", dim=True), err=True)
        async for event in agent.stream(request):
            if isinstance(event, Account):
                return pieces, event
            pieces.append(event)
            if not quiet:
                click.echo(show.coloured(event), nl=False)
                sys.stdout.flush()
    raise AssertionError("an answer ends with its account")


@asynccontextmanager
async def running(config: AgentConfig) -> AsyncIterator[Device]:
    """A device with its links up, and all of it ended in the end."""
    device = opened(config, None, lambda why: click.echo(click.style(f"({why})", dim=True), err=True))
    try:
        async with device.linked():
            yield device
    finally:
        device.close()
