"""`skerry agent`: the daemon with the OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

import click
import msgspec

from agent.api.app import Api, ModelName
from agent.api.daemon import serve
from agent.api.listen import check_listening
from agent.config import AgentConfig
from agent.device import Device
from models.store import Places
from protocol.errors import StoreInUse
from tools.device import opened
from tools.fetch import model_file
from tools.settings import configuration, over

log = logging.getLogger(__name__)


@click.command(epilog="Example: skerry agent --cloud http://127.0.0.1:8431 --threads 2")
@click.option("--config", type=click.Path(path_type=Path), help="the agent's TOML file")
@click.option("--port", type=click.IntRange(0, 65_535), help="port to listen on; 0: any free one")
@click.option("--model", help="catalog id, path of a GGUF file or of a folder with an ONNX model")
@click.option("--threads", type=click.IntRange(0), help="most threads to use")
@click.option("--cloud", help="URL of `skerry serve`")
@click.option("--broker", help="MQTT broker of the peers, mqtt://host:1883")
def agent(
    config: Path | None,
    port: int | None,
    model: str | None,
    threads: int | None,
    cloud: str | None,
    broker: str | None,
) -> None:
    """Serve the OpenAI-compatible API on this device until SIGTERM or Ctrl-C.

    Point any OpenAI client at http://127.0.0.1:8430/v1; /health, /ready and /metrics are there as well.
    """
    settings = configuration(AgentConfig, "agent", config, os.environ)
    settings = msgspec.structs.replace(
        settings,
        model=over(settings.model, name=model, threads=threads),
        cloud=over(settings.cloud, url=cloud),
        peers=over(settings.peers, broker=broker),
        api=over(settings.api, port=port),
    )
    check_listening(settings.api)
    logging.basicConfig(level=settings.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    device = opened(settings, StoreInUse, log.warning)
    try:
        path = model_file(settings.model.name, Places.of(os.environ))
        asyncio.run(_serve(device, settings, ModelName.of(settings.model.name, path)))
    finally:
        device.close()


async def _serve(device: Device, settings: AgentConfig, model: ModelName) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def begin_to_stop() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # the second one ends the process at once

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin_to_stop)

    def ready(url: str) -> None:
        cloud, broker = settings.cloud.url or "none", settings.peers.broker or "none"
        print(f"skerry agent: ready on {url} (model {model.id}, cloud {cloud}, broker {broker})", flush=True)

    collector = device.adaptation.collector if device.adaptation is not None else None
    await serve(device, Api(device, settings.api, model, collector=collector), settings.api, ready, stop)
