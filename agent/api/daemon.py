"""The daemon: listens, serves until it is told to stop, and lets running answers finish."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiohttp import web

from agent.agent import Agent
from agent.api.app import Api
from agent.config import Api as ApiConfig
from agent.device import Device
from protocol.errors import ConfigError

_GRACE_SECONDS = 5.0  # what running answers get to finish


async def serve(
    device: Device,
    api: Api,
    config: ApiConfig,
    ready: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """Serves until `stop` is set; `ready` is called with the address once clients are let in. The agent's thread is
    ended then, its engine is the caller's to close. Raises ConfigError if the address cannot be listened on."""
    runner = web.AppRunner(
        api.app,
        access_log=None,
        logger=_silent(),
        handler_cancellation=True,  # a client that goes away ends its answer
        shutdown_timeout=2 * _GRACE_SECONDS,
    )
    await runner.setup()
    async with device.linked():
        try:
            await _listen(runner, config)
            ready(_url(runner.addresses[0]))
            await stop.wait()
        finally:
            await _drain(runner, device.agent)


async def _listen(runner: web.AppRunner, config: ApiConfig) -> None:
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as error:
        where = f"{config.host}:{config.port} ({error.strerror or error})"
        raise ConfigError(f"cannot listen on {where}: choose another --port or api.host") from None


async def _drain(runner: web.AppRunner, agent: Agent) -> None:
    """Lets nobody in any more, gives running answers a while, then ends them with an error of their own."""
    cleanup = asyncio.create_task(runner.cleanup())
    await asyncio.wait((cleanup,), timeout=_GRACE_SECONDS)
    await asyncio.to_thread(agent.scheduler.close)
    await cleanup


def _url(address: tuple[str, int]) -> str:
    host, port = address[0], address[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _silent() -> logging.Logger:
    """For aiohttp, which would quote what it cannot parse: errors of handlers are logged by the application."""
    return logging.Logger("http", logging.CRITICAL + 1)
