"""A device from its configuration, which works without what it keeps if the disk leaves it no other way."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, suppress

from msgspec.structs import replace

from agent.assemble import assemble
from agent.config import AgentConfig, device_folder
from agent.device import Device
from agent.learn.learner import state_of
from agent.learn.ledger_store import LedgerReader
from models.store import Places
from protocol.errors import StoreError
from tools.fetch import model_file
from tools.settings import over


def opened(config: AgentConfig, unless: type[StoreError] | None, tell: Callable[[str], None]) -> Device:
    """The device; if what it keeps on disk can't be used, without memory, peers and learning, but with the threshold
    that was learned. `tell` then hears why. An error of the kind `unless` is raised all the same."""
    path = model_file(config.model.name, Places.of(os.environ))
    try:
        return assemble(config, path, tell)
    except StoreError as error:
        if unless is not None and isinstance(error, unless):
            raise
        tell(f"without memory, peers and learning: {error}")
    alone = replace(
        config,
        memory=over(config.memory, enabled=False),
        peers=over(config.peers, broker=""),
        adapt=over(config.adapt, enabled=False),
        policy=over(config.policy, learn=False, threshold=_learned(config)),
    )
    return assemble(alone, path)


def _learned(config: AgentConfig) -> float | None:
    """The threshold in force where another process learns; None: that can't be read either."""
    with suppress(StoreError), closing(LedgerReader(device_folder(config) / "ledger.db")) as ledger:
        state = state_of(ledger.get)
        return state.threshold if state else None
    return None
