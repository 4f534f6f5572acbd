from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import Embedded, Mosquitto
from tests.protocol.transport.worlds import BusWorld, MqttWorld, World


def make(kind: str, folder: Path) -> World:
    if kind == "bus":
        return BusWorld()
    return MqttWorld(Mosquitto(folder) if kind == "mosquitto" else Embedded(folder))


@pytest.fixture(params=["bus", "mosquitto", "embedded"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made = make(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["bus", "mosquitto"])
def lasting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Whose broker remembers over a restart."""
    made = make(request.param, tmp_path)
    yield made
    made.close()
