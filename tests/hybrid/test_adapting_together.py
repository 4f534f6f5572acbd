"""What devices have learned each by itself, and one adapter that their edge makes of it: real trainings, broker, files
and gates."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, closing
from pathlib import Path

from agent.adapt.lessons import Lessons
from agent.adapt.recipe import Recipe
from agent.adapt.session import Limits, Session
from agent.adapt.store import FLEET, OWN, AdapterStore
from agent.adapt.supervise import Supervisor
from agent.api.metrics import Metrics
from agent.assemble import assemble
from agent.config import Adapt, AgentConfig, Model, Peers
from agent.config import Device as DeviceConfig
from agent.device import Device
from agent.memory.key import space_of
from models.engine.gguf import GgufTokenizer
from models.fingerprint import fingerprint
from protocol.adapters import AdapterGroup
from server.edge.adapter_overview import adapter_overview
from server.edge.config import AdaptersSection, Broker, EdgeConfig, Place, RoundsSection
from server.edge.config import assemble as assemble_edge
from tests.agent.adapt.small_model import small_model
from tests.agent.adapt.taught import lessons
from tests.brokers import Mosquitto
from tests.hybrid.test_fleet import eventually

RECIPE = Recipe(alpha=8.0, modules=("attn_q", "attn_v"), batch=8, epochs=1.0, rate=0.01, bfloat16=False)
NAMES = ("cellar", "kitchen", "roof")
PATIENCE = 240.0


def device(folder: Path, name: str, model: Path, broker: str) -> Device:
    """That has learned already."""
    taught = lessons(GgufTokenizer.open(model), 80 + 10 * NAMES.index(name))
    with closing(Lessons(folder / name / "lessons", fingerprint(model))) as kept:
        kept.add_all(taught)
    adapters = folder / name / "adapters"
    store = AdapterStore(adapters, fingerprint(model))
    with closing(Session(adapters, model, store, Supervisor(), Limits(2 * 10**9, 4, 10.0, 1))) as training:
        outcome = training.learn(taught, RECIPE)
    assert not outcome.adapter.dropped, outcome.adapter.verdict
    config = AgentConfig(
        model=Model(name=str(model), context=512, sequences=1, threads=1),
        device=DeviceConfig(folder=str(folder / name), name=name),
        peers=Peers(broker=broker),
        adapt=Adapt(train=False, idle_s=0.0, threads=1, celsius=120.0, busy=1.0),
    )
    return assemble(config, model)


def in_use(device: Device) -> dict[str, str]:
    """Adapters by slot."""
    return {entry.slot: entry.id for entry in device.agent.shelf.entries}


def made(folder: Path) -> list[AdapterGroup]:
    return [kept.group for kept in adapter_overview(folder).groups]


async def learned_together(devices: list[Device], folder: Path, model: Path) -> None:
    async with AsyncExitStack() as stack:
        for each in devices:
            await stack.enter_async_context(each.linked())
        own = {in_use(device)[OWN] for device in devices}
        assert len(own) == len(devices), "each has learned from other lessons"
        await asyncio.to_thread(eventually, lambda: all(FLEET in in_use(device) for device in devices), PATIENCE)
        [group] = made(folder)
        assert (group.model, group.devices, list(group.blobs)) == (fingerprint(model), 3, [4])
        assert {in_use(device)[FLEET] for device in devices} == {group.blobs[4].id}
        space = space_of(group.model, group.blobs[4].id)
        for each in devices:
            assert each.keeper is not None
            assert space in each.keeper.spaces
            assert each.adaptation is not None
            assert each.adaptation.federation is not None
            assert each.adaptation.federation.bytes_up > 0
            told = Metrics(each).text().decode()
            assert 'skerry_adapter_events_total{kind="uploaded"} 1.0' in told
            assert "skerry_adapters_committed_total 1.0" in told
            assert each.adaptation.federation.bytes_down == group.blobs[4].bytes


def test_what_three_devices_learn_becomes_an_adapter_that_all_use(smollm2: Path, tmp_path: Path) -> None:
    model = small_model(smollm2, tmp_path / "narrow.gguf")
    with Mosquitto(tmp_path / "broker") as broker:
        edge = assemble_edge(
            EdgeConfig(
                edge=Place(folder=str(tmp_path / "edge")),
                broker=Broker(url=broker.url),
                rounds=RoundsSection(enabled=False),
                adapters=AdaptersSection(enabled=True, every=1e6, collect=600.0, spread=0.0, devices=3, port=0),
            )
        )
        devices = [device(tmp_path, name, model, broker.url) for name in NAMES]
        edge.start()
        try:
            asyncio.run(learned_together(devices, tmp_path / "edge", model))
        finally:
            for each in devices:
                each.close()
            edge.close()
