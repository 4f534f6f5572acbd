"""Peer memory on top of federated thresholds: what one device was told, the others of its cluster need not ask.

The product's key, rule and evidence (docs/memory.md), with exact search; for tasks whose answer is one step. All
prompts end alike, so tails are always the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agent.memory.base import Neighbour
from agent.memory.key import TAILS
from agent.memory.rule import NEIGHBOURS, judge
from agent.memory.rule_evidence import BOUND, Evidence
from protocol.topics import NEWS, Cluster
from protocol.transport.inbox import packet_bytes
from tools.eval.arms_learned import Similar
from tools.eval.fleets import Fleet, Pool, Rows
from tools.eval.measure import sizes
from tools.eval.play import Bools, Numbers

HITS_AUDITED = 0.05  # agent/config.py: memory.audit, the least share


class Memory(Similar):
    """Escalated steps are looked up first; the LLM's answers are published to the cluster."""

    def __init__(self, steps: Pool, drawn: Fleet, price: float) -> None:
        super().__init__(steps, drawn, price)
        assert steps.views is not None
        self._views = steps.views
        self._kept: list[list[int]] = [[] for _ in range(int(drawn.cluster.max()) + 1)]
        self._evidence = [Evidence(BOUND) for _ in range(drawn.devices)]
        self._rng = np.random.default_rng(0)
        self._entry = packet_bytes(Cluster("fleet", "cluster-0").path(NEWS, "device-0"), bytes(sizes()[0]), NEWS.qos)

    def resolve(self, rows: Rows) -> tuple[Rows, Numbers]:
        written, reach = np.full(len(rows), -1), np.ones(len(rows))
        for at, row in enumerate(rows.tolist()):
            device = int(self.drawn.device[row])
            cluster = int(self.drawn.cluster[device])
            evidence, draft, said = self._evidence[device], int(self._views.draft[row]), int(self._views.said[row])
            candidate = judge(self._near(row, cluster), self._plausibility(row), draft, evidence)
            if candidate is not None and candidate.hit:
                reach[at] = max(HITS_AUDITED, evidence.audit_rate)
                if self._rng.random() >= reach[at]:
                    written[at] = candidate.token
                    continue
            if candidate is not None:
                evidence.note(
                    candidate.score,
                    memory_right=candidate.token == said,
                    draft_right=draft == said,
                    agree=candidate.token == draft,
                    propensity=float(reach[at]),
                )
            self._kept[cluster].append(row)
            self.peer_bytes += self._entry * int((self.drawn.cluster == cluster).sum())  # up once, down to the others
        return written, reach

    def right(self, rows: Rows, written: Rows) -> Bools:
        right: Bools = written == self.steps.data.label[rows]
        return right

    def agree(self, rows: Rows, written: Rows) -> Bools:
        agree: Bools = written == self._views.said[rows]
        return agree

    def _near(self, row: int, cluster: int) -> list[Neighbour]:
        rows = np.array(self._kept[cluster], np.intp)
        similarity = self._views.similarity[row, rows]
        best = np.argsort(-similarity, kind="stable")[:NEIGHBOURS]
        return [
            Neighbour(other, cosine, TAILS[-1], int(self._views.said[other]), 1.0, 1, 1.0, b"", self._views.keys[other])
            for other, cosine in zip(rows[best].tolist(), similarity[best].tolist(), strict=True)
        ]

    def _plausibility(self, row: int) -> Callable[[int], float]:
        x = self._views.x[row]
        return lambda label: float(x[label])
