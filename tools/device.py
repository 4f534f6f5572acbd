"""A device from its configuration, which works without its memory if the disk leaves it no other way."""

from __future__ import annotations

import os
from collections.abc import Callable

from msgspec.structs import replace

from agent.assemble import assemble
from agent.config import AgentConfig
from agent.device import Device
from models.store import Places
from protocol.errors import StoreError
from tools.fetch import model_file
from tools.settings import over


def opened(config: AgentConfig, unless: type[StoreError] | None, tell: Callable[[str], None]) -> Device:
    """The device, without memory and peers if what it keeps on disk can't be used; `tell` then hears why. An error of
    the kind `unless` is raised all the same."""
    path = model_file(config.model.name, Places.of(os.environ))
    try:
        return assemble(config, path, tell)
    except StoreError as error:
        if unless is not None and isinstance(error, unless):
            raise
        tell(f"without memory and peers: {error}")
    alone = replace(config, memory=over(config.memory, enabled=False), peers=over(config.peers, broker=""))
    return assemble(alone, path)
