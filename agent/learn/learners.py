"""Thresholds by what the SLM writes with: the bare model has one, and so has each adapter in use.

An adapter changes how sure the model is, and how often the LLM would disagree, so what was seen of one says nothing of
another. Each has a ledger of its own, beside the adapter's file. Of answers that mix adapters nothing is noted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from agent.learn.learner import Learner
from agent.learn.ledger import Ledger
from agent.loop import Token
from agent.policy import ThresholdPolicy
from protocol.errors import StoreError

log = logging.getLogger(__name__)


class Learners:
    """`note` and `policy_of` are for the engine's thread; everything else for any other. `bare`: the bare model's,
    which is closed by others; adapters follow its goal."""

    def __init__(self, bare: Learner) -> None:
        self.bare = bare
        self._lock = threading.Lock()  # of `follow`, `refresh` and `close`
        self._adapted: dict[str, Learner] = {}  # by adapter; never changed, but replaced by another one
        self._closed = False

    def note(self, token: Token, position: int) -> None:
        """As Learner's."""
        for learner in (self.bare, *self._adapted.values()):
            learner.note(token, position)

    def policy_of(self, adapter: str) -> ThresholdPolicy:
        learner = self._adapted.get(adapter)
        return self.bare.policy if learner is None else learner.policy

    def follow(self, adapters: Mapping[str, Path]) -> None:
        """These adapters (id to file) are in use from now on, and no others. Those of others keep their ledgers. One
        that takes the place of another begins with its threshold, any other one with the bare model's. One whose ledger
        cannot be opened is written with at the bare model's."""
        with self._lock:
            if self._closed:
                return
            before, now = self._adapted, dict[str, Learner]()
            gone = [learner for id, learner in before.items() if id not in adapters]
            start = (gone[0] if len(gone) == 1 else self.bare).policy.threshold
            for id, path in adapters.items():
                learner = before.get(id) or self._open(id, path, start)
                if learner is not None:
                    now[id] = learner
            self._adapted = now
            for id in before.keys() - now.keys():
                before[id].close()

    def refresh(self) -> None:
        """Learns from what came in since the last time."""
        with self._lock:
            self.bare.refresh()
            for learner in self._adapted.values():
                learner.configured = self.bare.goal
                learner.refresh()

    def close(self) -> None:
        """Of the adapters. Idempotent."""
        with self._lock:
            self._closed = True
            for learner in self._adapted.values():
                learner.close()

    def _open(self, adapter: str, path: Path, start: float) -> Learner | None:
        bare = self.bare
        policy = ThresholdPolicy(start, bare.policy.audit)
        try:
            return Learner(Ledger(ledger_beside(path)), policy, bare.goal, bare.measure, bare.model, adapter)
        except StoreError as error:
            log.warning("adapter %s: %s", adapter[:12], error)
            return None


def ledger_beside(adapter: Path) -> Path:
    """Where an adapter's ledger is kept: beside its file."""
    return adapter.with_suffix(".ledger")
