"""`skerry demo`: the main job on real models: help from the cloud, an outage, and recovery."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from msgspec.structs import replace

from agent.agent import Account, Agent, Request
from agent.cloud import CloudResolver
from agent.config import AgentConfig
from models.engine.threads import physical_cores
from models.store import Places
from protocol.errors import LinkError
from protocol.resolve import Message
from tools import show
from tools.commands.ask import running
from tools.fetch import model_file
from tools.processes import Child, start_cloud

QUESTIONS = (
    "Why is the sky blue?",
    "How do I keep bread fresh for a week?",
    "Write one sentence about the sea.",
)
_BACK_SECONDS = 60.0


@click.command(epilog="Example: skerry demo --cloud-model qwen2.5-coder-1.5b")
@click.option("--model", default="smollm2-135m", show_default=True, help="the device's model")
@click.option("--cloud-model", default="qwen2.5-coder-0.5b", show_default=True, help="the cloud's model")
@click.option("--tokens", type=click.IntRange(8), default=64, show_default=True, help="per answer")
def demo(model: str, cloud_model: str, tokens: int) -> None:
    """Device and cloud on this machine: three questions, an outage, a recovery, a table."""
    places = Places.of(os.environ)
    for name in (model, cloud_model):
        model_file(name, places)
    threads = max(1, physical_cores() // 2)  # each of the two processes gets its share of the cores
    _say(f"Starting the cloud: {cloud_model} …")
    child, port = start_cloud(cloud_model, threads)
    with child:
        config = AgentConfig()
        config = replace(
            config,
            model=replace(config.model, name=model, threads=threads, sequences=1),
            cloud=replace(config.cloud, url=f"http://127.0.0.1:{port}", deadline_ms=2000),
        )
        rows = asyncio.run(_scenes(config, child, cloud_model, port, threads, tokens))
    _table(rows)


async def _scenes(
    config: AgentConfig, cloud: Child, cloud_model: str, port: int, threads: int, tokens: int
) -> list[tuple[str, Account]]:
    rows: list[tuple[str, Account]] = []
    async with running(config) as (agent, link):
        assert link is not None
        if not await link.connected(_BACK_SECONDS):
            raise LinkError(f"the demo's own cloud does not answer: {link.state}")
        click.echo(f"Each token is coloured by who wrote it: {show.legend()}\n")
        rows += [("cloud there", await _ask(agent, question, tokens)) for question in QUESTIONS]
        _say("Taking the cloud away (kill -9) …")
        cloud.kill()
        rows.append(("cloud gone", await _ask(agent, QUESTIONS[0], tokens)))
        _say("Bringing the cloud back …")
        with _restarted(cloud_model, threads, port):
            await _recovered(link)
            rows.append(("cloud back", await _ask(agent, QUESTIONS[0], tokens)))
    return rows


@contextmanager
def _restarted(model: str, threads: int, port: int) -> Iterator[Child]:
    child, _ = start_cloud(model, threads, "--port", str(port))
    with child:
        yield child


async def _recovered(link: CloudResolver) -> None:
    """The device finds out by itself; this only waits until it has."""
    if not await link.connected(_BACK_SECONDS):
        raise LinkError(f"the device did not find the cloud again: {link.state}")


async def _ask(agent: Agent, question: str, tokens: int) -> Account:
    click.echo(click.style(f"> {question}", bold=True))
    async for event in agent.stream(Request([Message("user", question)], max_tokens=tokens)):
        if isinstance(event, Account):
            click.echo("\n" + click.style(show.summary(event), dim=True) + "\n")
            return event
        click.echo(show.coloured(event), nl=False)
        sys.stdout.flush()
    raise AssertionError("an answer ends with its account")


def _table(rows: list[tuple[str, Account]]) -> None:
    heads = ("", "tokens", "local", "cloud", "fallback", "LLM saved", "bytes up", "bytes down", "tok/s")
    click.echo(f"{heads[0]:<11}" + "".join(f"{head:>11}" for head in heads[1:]))
    for name, account in rows:
        counts = account.counts
        saved = 1 - account.llm_tokens / max(1, account.tokens)
        numbers = (account.tokens, counts["local"], counts["cloud"], counts["fallback"])
        click.echo(
            f"{name:<11}"
            + "".join(f"{number:>11}" for number in numbers)
            + f"{saved:>11.0%}{account.bytes_up:>11}{account.bytes_down:>11}{account.tok_s:>11.1f}"
        )


def _say(text: str) -> None:
    click.echo(click.style(text, fg="magenta"))
