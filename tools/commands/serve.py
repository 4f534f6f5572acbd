"""`skerry serve`: the cloud resolver, and its API keys."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import click

from models.store import Places, resolve_model
from server.cloud.app import start
from server.cloud.backends import open_upstream
from server.cloud.config import ServeConfig
from server.cloud.keys import KeyFile, keys_path
from tools.settings import configuration

log = logging.getLogger(__name__)

_VARIABLES = {
    "host": "SKERRY_LISTEN_HOST",
    "port": "SKERRY_LISTEN_PORT",
    "kind": "SKERRY_UPSTREAM_KIND",
    "model": "SKERRY_UPSTREAM_MODEL",
    "threads": "SKERRY_UPSTREAM_THREADS",
    "url": "SKERRY_UPSTREAM_URL",
    "drain": "SKERRY_DRAIN_SECONDS",
}


@click.group(name="serve", invoke_without_command=True)
@click.option("--config", "path", type=click.Path(path_type=Path), help="TOML file; else serve.toml in your folder.")
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="TCP port; 0 takes a free one and prints it.")
@click.option("--kind", type=click.Choice(["embedded", "openai"]), help="Where the LLM runs.")
@click.option("--model", help="embedded: catalog id or path of the LLM (GGUF file or ONNX folder).")
@click.option("--threads", type=click.IntRange(0), help="embedded: threads of the LLM; 0: one per physical core.")
@click.option("--url", help="openai: base address of the server's API.")
@click.option("--drain", type=click.FloatRange(0), help="Seconds that running sessions get to finish after SIGTERM.")
@click.pass_context
def serve(context: click.Context, /, path: Path | None, **options: Any) -> None:
    """Run the cloud resolver: a large model that helps devices with single tokens.

    Listens on this machine alone unless told otherwise, and elsewhere only with keys. SIGTERM lets running sessions
    finish.

    \b
    Examples:
      skerry serve --model qwen2.5-coder-0.5b --threads 1
      skerry serve --kind openai --url http://127.0.0.1:8080/v1
      skerry serve keys add phone
      skerry serve --config serve.toml --host 0.0.0.0
    """
    config = configuration(ServeConfig, "serve", path, _variables(options))
    context.obj = config
    if context.invoked_subcommand is None:
        logging.basicConfig(level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        asyncio.run(_serve(config))


@serve.group(name="keys")
def keys() -> None:
    """The API keys that devices have to send. A running server notices changes at once.

    \b
    Examples:
      skerry serve keys add phone
      skerry serve keys list --json
      skerry serve --config serve.toml keys revoke phone
    """


@keys.command(name="add")
@click.argument("name")
@click.pass_obj
def add_key(config: ServeConfig, name: str) -> None:
    """Make a key and print it, this once: only its hash is kept.

    \b
    Example:
      skerry serve keys add phone
    """
    click.echo(_key_file(config).add(name))
    click.echo("Keep it: it is not shown again. The device sends it as `cloud.key`.", err=True)


@keys.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_obj
def list_keys(config: ServeConfig, as_json: bool) -> None:
    """Name the keys.

    \b
    Example:
      skerry serve keys list --json
    """
    rows = [{"name": key.name, "created": key.created} for key in _key_file(config).entries()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['created']}  {row['name']}")
    if not rows:
        click.echo("no keys; `skerry serve keys add NAME` makes one")


@keys.command(name="revoke")
@click.argument("name")
@click.pass_obj
def revoke_key(config: ServeConfig, name: str) -> None:
    """Take a key's right away; whoever is connected with it is disconnected.

    \b
    Example:
      skerry serve keys revoke phone
    """
    _key_file(config).revoke(name)
    click.echo(f"revoked {name}")


def _key_file(config: ServeConfig) -> KeyFile:
    return KeyFile(keys_path(config.listen.keys_file))


def _variables(options: dict[str, Any]) -> dict[str, str]:
    """The command line over file and environment: an option stands for the environment variable of its key."""
    given = {_VARIABLES[name]: str(value) for name, value in options.items() if value is not None}
    return {**os.environ, **given}


async def _serve(config: ServeConfig) -> None:
    places = Places.of(os.environ)
    upstream = await open_upstream(config, lambda name: resolve_model(name, places))
    try:
        first, second = _stop_signals()
        running = await start(config, upstream)
        click.echo(f"skerry serve: ready on {running.host}:{running.port} ({upstream.name})")
        await first.wait()
        log.info("draining")
        drain, cut = asyncio.create_task(running.drain()), asyncio.create_task(second.wait())
        await asyncio.wait([drain, cut], return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        cut.cancel()
        await running.close()
    finally:
        await upstream.close()


def _stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first SIGTERM or SIGINT, which drains, and by the second one, which cuts that short."""
    first, second = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return first, second
