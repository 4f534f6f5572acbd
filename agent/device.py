"""A running device: its agent, what it remembers, and its links to peers and cloud."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.adapt.assemble import Adaptation
from agent.agent import Agent
from agent.cloud import CloudResolver
from agent.learn.learner import Learner
from agent.learn.learners import Learners
from agent.memory.keeper import Keeper
from agent.peers.network import Network

if TYPE_CHECKING:
    from agent.learn.federation import Federation

log = logging.getLogger(__name__)

_SAVE_SECONDS = 30.0  # what was learned about when to reuse is written down this often
_LEARN_SECONDS = 10.0  # the threshold follows the ledger this often


@dataclass(frozen=True, slots=True)
class Device:
    """Whoever is None is not configured."""

    agent: Agent
    cloud: CloudResolver | None = None
    keeper: Keeper | None = None
    network: Network | None = None
    learner: Learner | None = None
    federation: Federation | None = None
    learners: Learners | None = None
    adaptation: Adaptation | None = None

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[None]:
        """Keeps the links up; they are ended before the model goes, which replies are put into tokens with."""
        tasks = []
        if self.cloud is not None:
            tasks.append(asyncio.create_task(_survive("the link to the cloud", self.cloud.run)))
        if self.keeper is not None:
            tasks.append(asyncio.create_task(_survive("saving", self._save_now_and_then)))
        if self.learners is not None:
            tasks.append(asyncio.create_task(_survive("learning", self._learn_now_and_then)))
        if self.adaptation is not None:
            await asyncio.to_thread(self.adaptation.start)
        if self.federation is not None:
            self.federation.start()
        if self.network is not None:
            self.network.start()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.network is not None:
                await asyncio.to_thread(self.network.close)
            if self.federation is not None:
                await asyncio.to_thread(self.federation.close)
            if self.adaptation is not None:
                await asyncio.to_thread(self.adaptation.stop)

    async def _save_now_and_then(self) -> None:
        assert self.keeper is not None
        while True:
            await asyncio.sleep(_SAVE_SECONDS)
            await asyncio.to_thread(self.keeper.save)

    async def _learn_now_and_then(self) -> None:
        assert self.learners is not None
        while True:
            await asyncio.sleep(_LEARN_SECONDS)
            await asyncio.to_thread(self.learners.refresh)

    def close(self) -> None:
        """Frees the model and closes what is kept on disk. Idempotent."""
        self.agent.close()
        if self.adaptation is not None:
            self.adaptation.collector.close()
        if self.keeper is not None:
            self.keeper.close()
        if self.learners is not None:
            self.learners.close()
        if self.learner is not None:
            self.learner.close()


async def _survive(what: str, run: Callable[[], Awaitable[None]]) -> None:
    """The device goes on without it if this code itself fails."""
    try:
        await run()
    except Exception as error:
        log.error("%s ended: %s", what, type(error).__name__)
