"""From a configuration to a running device."""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from agent.adapt.assemble import adaptation, collector_of
from agent.adapt.collect import Collector
from agent.adapt.router import Router
from agent.adapt.session import NO_ADAPTERS, takes_adapters
from agent.agent import Agent, Finished, Options
from agent.breaker import Breaker
from agent.chain import Chain
from agent.cloud import CloudOptions, CloudResolver
from agent.config import AgentConfig, device_folder, goal
from agent.device import Device
from agent.engine import open_model
from agent.learn.learner import Learner
from agent.learn.learners import Learners
from agent.learn.ledger import Ledger
from agent.link.identity import Identity, identity
from agent.loop import Token
from agent.memory.keeper import Keeper, recall_evidence
from agent.memory.key import KEY_BYTES, KeyMaker, space_of
from agent.memory.memory import EntryMemory
from agent.peers.network import Network
from agent.peers.resolver import AskOptions
from agent.peers.sharing import Sharing
from agent.peers.trust import Trust
from agent.policy import ThresholdPolicy
from agent.privacy import Privacy
from models.engine.base import Engine
from protocol.errors import ConfigError
from protocol.memory import SPACE_BYTES, Entry
from protocol.topics import Cluster, device_name
from protocol.transport.mqtt import MqttOptions, MqttTransport

if TYPE_CHECKING:
    from agent.learn.federation import Federation

log = logging.getLogger(__name__)

_DAY = 86_400.0
_MEGABYTE = 10**6


def assemble(config: AgentConfig, model: Path, tell: Callable[[str], None] = log.info) -> Device:
    """The device for the model; its links are down until `Device.linked`. `tell` hears of what takes long.
    Raises BadModelFile, ConfigError, StoreError."""
    if config.peers.broker and not config.memory.enabled:
        raise ConfigError("peers.broker is set but memory.enabled is false: peers share what is in the memory")
    engine = open_model(config.model, model, hidden=config.memory.enabled)  # with it a prompt takes one more pass
    try:
        return _assemble(config, model, engine, tell)
    except BaseException:
        engine.close()
        raise


def _assemble(config: AgentConfig, model: Path, engine: Engine, tell: Callable[[str], None]) -> Device:
    policy = ThresholdPolicy(config.policy.threshold, config.policy.audit if config.policy.learn else 0.0)
    options = Options(
        policy=policy,
        measure=config.policy.measure,
        mode=config.cloud.mode,
        weight=config.cloud.weight,
        ahead=config.cloud.ahead,
        in_flight=config.cloud.in_flight,
    )
    cloud = _cloud(config, engine) if config.cloud.url else None
    folder = device_folder(config)
    with ExitStack() as opened:
        learner = learners = None
        if config.policy.learn:
            ledger = Ledger(folder / "ledger.db")
            opened.callback(ledger.close)
            learner = Learner(ledger, policy, goal(config.policy), config.policy.measure, engine.info.fingerprint)
            learners = Learners(learner)
        collector = _collector(config, model, engine)
        if collector is not None:
            opened.callback(collector.close)
        keeper = network = federation = None
        if config.memory.enabled:
            who = identity(folder / "device.key")
            keeper = _keeper(config, engine, folder, who, tell)
            opened.callback(keeper.close)
            network = _network(config, engine, keeper, folder, who) if config.peers.broker else None
            if network is not None and learner is not None and config.rounds.enabled:
                federation = _federation(config, network, learner, who)
        peers = network.resolver if network is not None and config.peers.ask else None
        agent = Agent(
            engine,
            options,
            cloud if keeper is None else Chain(keeper, peers, cloud),
            config.api.queue,
            inward=None if keeper is None else Chain(keeper),
            note=_forget if learners is None else learners.note,
            finished=_forget_answer if collector is None else collector.note,
            policy_of=None if learners is None else learners.policy_of,
            router=None if keeper is None else Router(keeper.keys, config.adapt.mix, config.adapt.near),
            privacy=_privacy(config),
        )
        opened.callback(agent.scheduler.close)
        adapted = None
        if collector is not None:
            adapted = adaptation(config, model, agent, collector, keeper, learners, network)
        opened.pop_all()
        return Device(agent, cloud, keeper, network, learner, federation, learners, adapted)


def _collector(config: AgentConfig, model: Path, engine: Engine) -> Collector | None:
    """None: the device learns no adapters, and so keeps nothing to learn them from."""
    if not config.adapt.enabled:
        return None
    if not takes_adapters(model):
        log.info("no lessons are kept: %s", NO_ADAPTERS)
        return None
    return collector_of(config, engine.info.fingerprint)


def _forget(token: Token, position: int) -> None:
    """For a device that does not learn."""


def _forget_answer(answer: Finished) -> None:
    """For a device that keeps no lessons."""


def _federation(config: AgentConfig, network: Network, learner: Learner, who: Identity) -> Federation:
    from agent.learn.federation import Federation, RoundOptions  # slow to load, and without a broker not needed
    from agent.learn.secure import Participant
    from agent.learn.secure_link import SecureLink

    given, draw = config.rounds, random.SystemRandom()
    cluster = Cluster(config.device.fleet, config.device.cluster)
    participant = Participant(cluster, network.me, who, network.around.key_of, os.urandom)
    options = RoundOptions(given.secure, given.clip, given.noise, given.epsilon, given.delta)
    return Federation(
        cluster,
        network.me,
        network.transport,
        learner,
        options,
        SecureLink(cluster, network.me, network.transport, participant, time.monotonic),
        time.monotonic,
        draw.random,
        lambda: draw.gauss(0.0, 1.0),
    )


def _privacy(config: AgentConfig) -> Privacy | None:
    given = config.privacy
    return None if given.detect == "off" else Privacy(given.detect, given.regions)


def _cloud(config: AgentConfig, engine: Engine) -> CloudResolver:
    options = CloudOptions(
        url=config.cloud.url,
        key=config.cloud.key.strip(),  # a secret file ends with a newline
        deadline=config.cloud.deadline_ms / 1000,
        top=config.cloud.top,
        burst=config.cloud.burst,
    )
    jitter = random.SystemRandom().random
    return CloudResolver(options, engine.tokenizer, Breaker(time.monotonic, jitter), time.monotonic, jitter)


def _keeper(config: AgentConfig, engine: Engine, folder: Path, who: Identity, tell: Callable[[str], None]) -> Keeper:
    keys = _keys(engine, folder, tell)
    memory = EntryMemory(
        folder / "memory", max_bytes=config.memory.megabytes * _MEGABYTE, max_age=config.memory.days * _DAY
    )
    trust = Trust(who.public, bound=config.memory.wrong_bound, base=config.memory.audit, records=memory)
    kept = folder / f"evidence-{keys.space.hex()}"
    evidence = recall_evidence(kept, config.memory.wrong_bound)
    return Keeper(memory, keys, trust, evidence, who.public, who.sign, time.time, kept)


def _keys(engine: Engine, folder: Path, tell: Callable[[str], None]) -> KeyMaker:
    """Calibrated once for each model."""
    space = space_of(engine.info.fingerprint)
    path = folder / f"space-{space.hex()}"
    known = KeyMaker.load(path, space, engine.info.width)
    if known is not None:
        return known
    tell(f"preparing the memory for {Path(engine.info.name).stem}: some seconds, once")
    made = KeyMaker.calibrate(engine)
    try:
        made.save(path)
    except OSError as error:
        log.warning("%s: cannot be written, so the next start calibrates again: %s", path, error.strerror)
    return made


def _network(config: AgentConfig, engine: Engine, keeper: Keeper, folder: Path, who: Identity) -> Network:
    peers, device = config.peers, config.device
    name = device_name(device.name or f"device-{who.public.hex()[:12]}")
    transport = MqttTransport(
        MqttOptions(
            url=peers.broker,
            client_id=f"skerry-{name}",
            username=peers.username or (name if peers.password else ""),
            password=peers.password.strip(),
            ca=peers.ca,
            certificate=peers.certificate,
            key=peers.key,
        )
    )
    network = Network(
        Cluster(device.fleet, device.cluster),
        name,
        who,
        transport,
        keeper.memory,
        keeper.trust,
        folder,
        [keeper.keys.space],
        usable(engine.info.vocab),
        Sharing(peers.share, spaces_named(peers.unshared)),
        AskOptions(cap=peers.deadline_ms / 1000, hops=peers.hops),
    )
    keeper.share, keeper.name_of = network.gossip.share, network.around.name_of
    return network


def usable(vocab: int) -> Callable[[Entry], bool]:
    """Has an entry a key of our width, and a token of a model with `vocab` tokens? Others would only take up room."""
    return lambda entry: len(entry.key) == KEY_BYTES and 0 <= entry.token < vocab


def spaces_named(named: list[str]) -> frozenset[bytes]:
    """Raises ConfigError."""
    for space in named:
        if not re.fullmatch(f"[0-9a-fA-F]{{{2 * SPACE_BYTES}}}", space):
            raise ConfigError(
                f"peers.unshared: {space!r} is no space: write the {2 * SPACE_BYTES} hex digits that "
                "`skerry memory stats` shows"
            )
    return frozenset(map(bytes.fromhex, named))
