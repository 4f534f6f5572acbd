"""`skerry edge`: the edge service of one cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import click

from server.edge.config import EdgeConfig, assemble
from tools.settings import configuration

_VARIABLES = {
    "fleet": "SKERRY_EDGE_FLEET",
    "cluster": "SKERRY_EDGE_CLUSTER",
    "broker": "SKERRY_BROKER_URL",
    "neighbour": "SKERRY_NEIGHBOURS_BROKERS",
    "hops": "SKERRY_EDGE_HOPS",
}


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), help="TOML file; else edge.toml in your folder.")
@click.option("--fleet", help="The fleet that the cluster belongs to.")
@click.option("--cluster", help="The cluster that this edge serves.")
@click.option("--broker", help="Its MQTT broker, mqtt://host:1883 or mqtts://host:8883.")
@click.option("--neighbour", multiple=True, help="A cluster to ask and its broker: B=mqtt://host:1883.")
@click.option("--hops", type=click.IntRange(0), help="Clusters that a question may cross from here.")
def edge(path: Path | None, **options: Any) -> None:
    """Run a cluster's edge service: it tells the devices whom they can reach, and asks neighbouring clusters for them.

    Each cluster has its own broker and its own edge; two edges that are to ask each other name each other's broker.

    \b
    Examples:
      skerry edge --cluster A --broker mqtt://127.0.0.1:1883 --neighbour B=mqtt://10.0.0.2:1883
      skerry edge --config edge.toml
    """
    config = configuration(EdgeConfig, "edge", path, _variables(options))
    logging.basicConfig(level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    running = assemble(config)
    running.start()
    try:
        click.echo(f"skerry edge: serving cluster {config.edge.cluster} at {config.broker.url}")
        stop.wait()
    finally:
        running.close()


def _variables(options: dict[str, Any]) -> dict[str, str]:
    """The command line over file and environment: an option stands for the environment variable of its key."""
    options["neighbour"] = ",".join(options["neighbour"]) or None
    given = {_VARIABLES[name]: str(value) for name, value in options.items() if value is not None}
    return {**os.environ, **given}
