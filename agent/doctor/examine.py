"""All checks, in the order in which a person would make them."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Collection, Generator, Iterator, Mapping

from agent.config import AgentConfig
from agent.doctor.api import check_api
from agent.doctor.cloud import check_cloud
from agent.doctor.finding import Finding
from agent.doctor.machine import Machine, check_accelerator, check_clock, check_disk, check_machine, offloads
from agent.doctor.model import (
    check_catalog,
    check_memory,
    check_settings,
    check_speed,
    check_writing,
    find_model,
    missing_bytes,
)
from agent.doctor.training import check_training
from agent.engine import check_kind
from models.catalog import Catalog
from models.footprint import read_shape
from models.store import Places
from protocol.errors import ConfigError, SkerryError

_PLENTY = 1 << 60  # bytes; where the system does not tell its memory, nothing is said to be too large


def examine_machine(machine: Machine, now: float) -> Iterator[Finding]:
    yield check_machine(machine)
    yield check_clock(now)


def examine_variables(env: Mapping[str, str], known: Collection[str]) -> Iterator[Finding]:
    """Variables that look like Skerry's own but are not: a misspelt one would be ignored in silence."""
    for name in sorted(env):
        if name.startswith("SKERRY_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "remove it"
            yield Finding("warn", "configuration", f"the environment variable {name} means nothing", remedy)


def examine_agent(config: AgentConfig, places: Places, machine: Machine, now: float) -> Iterator[Finding]:
    """Model, cloud and API as they are configured; each finding as soon as it is known."""
    tokenizer = yield from _examine_model(config, places, machine)
    yield from asyncio.run(check_cloud(config.cloud, tokenizer, now))
    yield asyncio.run(check_api(config.api))


def _examine_model(config: AgentConfig, places: Places, machine: Machine) -> Generator[Finding, None, str | None]:
    """Its tokenizer's fingerprint, if it loads."""
    available = _PLENTY if machine.available is None else machine.available
    try:
        catalog = Catalog(places.entries)
    except SkerryError as error:
        yield Finding("error", "catalog", str(error), f"correct or remove it in {places.entries}")
        return None
    yield check_catalog(catalog, config.model, available)
    yield check_disk(places.models, missing_bytes(catalog, config.model.name, places))
    path, finding = find_model(catalog, config.model.name, places)
    yield finding
    if path is None:
        return None
    try:
        kind, shape = check_kind(config.model, path), read_shape(path)
    except SkerryError as error:
        remedy = "correct model.engine or model.name" if isinstance(error, ConfigError) else "choose another model"
        yield Finding("error", "model", str(error), remedy)
        return None
    yield check_accelerator(machine, kind, offloads(kind))
    yield from check_settings(shape, config, machine.cores)
    yield (memory := check_memory(shape, config.model, available))
    if memory.level == "error":
        return None  # loading it could take the machine down
    tokenizer, finding = check_writing(path, config.model, hidden=config.memory.enabled)
    yield finding
    yield from check_speed(path, shape, config, machine.cores)
    yield check_training(config, path, available)
    return tokenizer
