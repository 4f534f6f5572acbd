"""docs/http.md and docs/metrics.md say what the code does."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.adapt.service import Status
from agent.api.app import Api, ModelName
from agent.config import Api as ApiConfig
from agent.device import Device
from agent.learn.federation import Federation, RoundOptions
from agent.learn.goals import Price
from agent.learn.learner import Learner
from agent.learn.ledger import Ledger
from agent.learn.secure import Participant
from agent.learn.secure_link import SecureLink
from agent.link.identity import identity
from agent.memory.keeper import Keeper
from agent.memory.key import KeyMaker
from agent.memory.memory import EntryMemory
from agent.memory.rule_evidence import Evidence
from agent.peers.network import Network
from agent.peers.trust import Trust
from agent.policy import ThresholdPolicy
from protocol.topics import Cluster
from protocol.transport.bus import Bus, BusTransport

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """Of a device that has a memory and a broker, and learns."""
    agent = Mock()
    agent.shelf.entries = ()
    agent.scheduler.active = agent.scheduler.queued = agent.engine.threads = 0
    who = identity(tmp_path / "key")
    policy = agent.options.policy = ThresholdPolicy(0.25)
    learner = Learner(Ledger(tmp_path / "ledger.db"), policy, Price(0.3), "entropy", "model")
    with EntryMemory(tmp_path / "memory") as memory, closing(Bus()) as bus, closing(learner):
        trust, keys = (
            Trust(who.public, bound=0.1, base=0.05),
            KeyMaker(b"s" * 16, np.zeros(8, np.float32), np.ones(8, np.float32)),
        )
        keeper = Keeper(memory, keys, trust, Evidence(), who.public, who.sign, time.time, tmp_path / "evidence")
        transport = BusTransport(bus, "hut")
        home = Cluster("home", "main")
        network = Network(home, "hut", who, transport, memory, trust, tmp_path, [keys.space], lambda entry: True)
        participant = Participant(home, "hut", who, network.around.key_of, os.urandom)
        link = SecureLink(home, "hut", transport, participant, time.monotonic)
        federation = Federation(
            home, "hut", transport, learner, RoundOptions(), link, time.monotonic, lambda: 0.0, lambda: 0.0
        )
        adaptation = Mock()
        adaptation.collector.lessons.count = adaptation.collector.refused = 0
        adaptation.adapting.status = Status()
        adaptation.federation.counts = Counter()
        adaptation.federation.past.number = adaptation.federation.bytes_up = adaptation.federation.bytes_down = 0
        device = Device(agent, None, keeper, network, learner, federation, adaptation=adaptation)
        yield Api(device, ApiConfig(), ModelName("model", frozenset()))
        network.close()


def rows(file: str, columns: int) -> list[tuple[str, ...]]:
    """The cells of the document's first table, without code marks."""
    table = re.search(r"^\|---.*\n((?:\|.*\n)+)", (DOCS / file).read_text(), re.MULTILINE)
    assert table
    cells = [line.strip("|\n ").split(" | ") for line in table[1].splitlines()]
    return [tuple(cell.strip("` ") for cell in row[:columns]) for row in cells]


def test_every_endpoint_is_documented(api: Api) -> None:
    served = [(route.method, route.resource.canonical) for route in api.app.router.routes() if route.resource]
    assert rows("http.md", 2) == [(method, path) for method, path in served if method != "HEAD"]


def test_every_metric_is_documented(api: Api) -> None:
    exposed = [
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type, family.documentation)
        for family in text_string_to_metric_families(api.metrics.text().decode())
        if not family.name.endswith("_created")
    ]
    assert [tuple(cell.replace("`", "") for cell in row) for row in rows("metrics.md", 3)] == exposed
