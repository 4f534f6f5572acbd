"""From a configuration to a device that learns: lessons, training, adapters in use, rounds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.adapt.answers import Answers
from agent.adapt.collect import Collector
from agent.adapt.idle import Machine
from agent.adapt.lessons import lessons_of
from agent.adapt.service import Adapting
from agent.adapt.session import adapters_folder, limits_of, recipe_of
from agent.adapt.store import AdapterStore
from agent.agent import Agent
from agent.config import AgentConfig
from agent.learn.learners import Learners
from agent.memory.keeper import Keeper
from agent.peers.network import Network
from protocol.topics import Cluster

if TYPE_CHECKING:
    from agent.adapt.federation import AdapterFederation


@dataclass(frozen=True, slots=True)
class Adaptation:
    """`federation` None: the device takes no part in rounds of adapters."""

    collector: Collector
    adapting: Adapting
    federation: AdapterFederation | None

    def start(self) -> None:
        """Adapters that are in use already are there when this returns."""
        self.adapting.start()
        if self.federation is not None:
            self.federation.start()

    def stop(self) -> None:
        """Before the model goes, which adapters are attached to. Idempotent."""
        if self.federation is not None:
            self.federation.close()
        self.adapting.close()


def collector_of(config: AgentConfig, fingerprint: str) -> Collector:
    """Raises StoreError."""
    return Collector(lessons_of(config, fingerprint), Answers(time.monotonic))


def adaptation(
    config: AgentConfig,
    model: Path,
    agent: Agent,
    collector: Collector,
    keeper: Keeper | None,
    learners: Learners | None,
    network: Network | None,
) -> Adaptation:
    """Nothing of it runs yet. Raises StoreError."""
    adapt, fingerprint = config.adapt, agent.engine.info.fingerprint
    folder = adapters_folder(config)
    store = AdapterStore(folder, fingerprint)
    adapting = Adapting(
        folder,
        model,
        store,
        collector.lessons,
        Machine(Path("/"), adapt.celsius, adapt.busy),
        lambda: limits_of(adapt),
        train=adapt.train,
        enough=adapt.lessons,
        idle_s=adapt.idle_s,
        recipe=recipe_of(adapt),
        on_change=_in_use(agent, keeper, learners, network),
    )
    agent.scheduler.busy = adapting.activity
    federation = None
    if network is not None and adapt.share != "none":
        federation = _federation(config, network, store, adapting, folder / "rounds")
    return Adaptation(collector, adapting, federation)


def _federation(
    config: AgentConfig, network: Network, store: AdapterStore, adapting: Adapting, folder: Path
) -> AdapterFederation:
    from agent.adapt.federation import AdapterFederation  # slow to load, and without a broker not needed
    from agent.adapt.outgoing import ShareOptions, own_in

    adapt = config.adapt
    return AdapterFederation(
        Cluster(config.device.fleet, config.device.cluster),
        network.me,
        network.transport,
        folder,
        store.model,
        lambda: own_in(store),
        adapting.consider,
        ShareOptions(adapt.share, adapt.clip, adapt.noise, adapt.epsilon, adapt.delta),
        time.monotonic,
        random.SystemRandom().random,
        judged=lambda id: store.manifest(id) is not None,
    )


def _in_use(
    agent: Agent, keeper: Keeper | None, learners: Learners | None, network: Network | None
) -> Callable[[dict[str, Path]], None]:
    """What follows when other adapters are in use: requests get them, and memory, thresholds and peers know of them."""

    def change(slots: dict[str, Path]) -> None:
        agent.shelf.replace(slots)
        files = {entry.id: entry.path for entry in agent.shelf.entries}
        if keeper is not None:
            keeper.follow(agent.engine.info.fingerprint, files)
            if network is not None:
                network.use(keeper.spaces)
        if learners is not None:
            learners.follow(files)

    return change
