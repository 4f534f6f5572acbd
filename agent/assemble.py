"""From a configuration to a running agent."""

from __future__ import annotations

import random
import time
from pathlib import Path

from agent.agent import Agent, Options
from agent.breaker import Breaker
from agent.cloud import CloudOptions, CloudResolver
from agent.config import AgentConfig
from agent.policy import FixedThreshold
from models.engine.gguf import GgufEngine


def assemble(config: AgentConfig, model: Path) -> tuple[Agent, CloudResolver | None]:
    """The agent for the model file, and its link to the cloud if one is configured: run that as a task on an event
    loop. Raises BadModelFile."""
    engine = GgufEngine(
        model,
        name=config.model.name,
        context=config.model.context,
        sequences=config.model.sequences,
        threads=config.model.threads,
        kv=config.model.kv,
        repack=config.model.repack,
        hidden=False,  # nothing reads hidden states yet, and they cost each prompt one more pass
    )
    options = Options(
        policy=FixedThreshold(config.policy.threshold, config.policy.audit),
        measure=config.policy.measure,
        mode=config.cloud.mode,
        weight=config.cloud.weight,
        ahead=config.cloud.ahead,
        in_flight=config.cloud.in_flight,
    )
    cloud = _cloud(config, engine) if config.cloud.url else None
    return Agent(engine, options, cloud, config.api.queue), cloud


def _cloud(config: AgentConfig, engine: GgufEngine) -> CloudResolver:
    options = CloudOptions(
        url=config.cloud.url,
        key=config.cloud.key.strip(),  # a secret file ends with a newline
        deadline=config.cloud.deadline_ms / 1000,
        top=config.cloud.top,
        burst=config.cloud.burst,
    )
    jitter = random.SystemRandom().random
    return CloudResolver(options, engine.tokenizer, Breaker(time.monotonic, jitter), time.monotonic, jitter)
