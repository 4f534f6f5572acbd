"""Fleets of simulated devices over recorded steps: who works on which request, in which round, and what is kept fresh.

Devices differ by *label skew*: for each label, shares of its requests are drawn from a symmetric Dirichlet
distribution (Hsu, Qi and Brown, 2019). The smaller alpha, the more each device has labels of its own. Half of the
documents come as a stream, in rounds, on which policies learn; on the others, which are handed out alike, they are
measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ConfigError
from tools.eval.decisions import Decisions
from tools.eval.views import Views

CLUSTERS = 2  # edge brokers; which one a device is at has nothing to do with its requests
ROUNDS = 10
_REQUESTS, _DOCUMENTS = 8, 2  # for each device
_LEAST = 2  # requests of a device, in the stream and fresh
_DRAWS = 200

Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Pool:
    """Recorded steps of one or several small models, joined. `kind` (n,): which of `slms` takes the step; `request`
    (n,): the same for what several models were recorded on. `views`: what a memory needs to know, if that is known."""

    data: Decisions
    slms: tuple[str, ...]
    kind: Rows
    request: Rows
    views: Views | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """`device` (n,): who takes each step, -1: nobody. `stream`: the rows of each round, in the order in which they
    come. `fresh`: rows that policies are measured on. `cluster`, `kind` (devices,): the edge broker and the small model
    of each device."""

    device: Rows
    stream: list[Rows]
    fresh: Rows
    cluster: Rows
    kind: Rows

    @property
    def devices(self) -> int:
        return len(self.cluster)


def pool(recorded: Sequence[Decisions], views: Views | None = None) -> Pool:
    """All steps, as if of one pair: requests are numbered apart, hidden states are left out as they differ in width."""
    counts = [len(data.u) for data in recorded]
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(Decisions):
        parts = [getattr(data, field.name) for data in recorded]
        if isinstance(parts[0], np.ndarray) and field.name != "state":
            columns[field.name] = np.concatenate(parts)
    request = columns["item"].astype(np.intp)
    kind = np.repeat(np.arange(len(recorded)), counts)
    columns["item"] = (request + kind * (int(request.max(initial=-1)) + 1)).astype(np.int32)
    if len(recorded) > 1:
        columns["state"] = np.empty((len(request), 0), np.float16)
        columns["slm"] = " + ".join(data.slm for data in recorded)
    slms = tuple(data.slm for data in recorded)
    return Pool(dataclasses.replace(recorded[0], **columns), slms, kind, request, views)


def room(steps: Pool) -> int:
    """For how many devices there are requests. Raises ConfigError if it is not even two."""
    requests, documents = (len(np.unique(ids)) for ids in (steps.request, steps.data.document))
    if min(requests // _REQUESTS, documents // _DOCUMENTS) < 2:
        raise ConfigError(
            f"{requests} requests about {documents} texts are too few for a fleet: "
            f"at least {2 * _REQUESTS} about {2 * _DOCUMENTS} are needed"
        )
    return min(requests // _REQUESTS, documents // _DOCUMENTS)


def fleet(steps: Pool, devices: int, alpha: float, seed: int, rounds: int = ROUNDS) -> Fleet:
    """Device d has the small model d mod kinds. `devices`: at most `room`."""
    rng = np.random.default_rng(seed)
    requests, first, which = np.unique(steps.request, return_index=True, return_inverse=True)
    documents, of = np.unique(steps.data.document[first], return_inverse=True)
    streamed = (rng.permutation(len(documents)) < len(documents) // 2)[of]
    owner = owners(steps.data.label[first], streamed, devices, alpha, _LEAST, rng)
    kinds = len(steps.slms)
    mine = steps.kind == (owner % kinds)[which]
    turn = np.full(len(requests), -1)  # the round in which a request comes
    for one in range(devices):
        own = rng.permutation(np.flatnonzero((owner == one) & streamed))
        turn[own] = np.arange(len(own)) * rounds // len(own)
    rank = rng.permutation(len(requests))[which]
    stream = []
    for at in range(rounds):
        rows = np.flatnonzero((turn[which] == at) & mine)
        stream.append(rows[np.argsort(rank[rows], kind="stable")])
    return Fleet(
        device=np.where(mine, owner[which], -1),
        stream=stream,
        fresh=np.flatnonzero(~streamed[which] & mine),
        cluster=np.arange(devices) // kinds % CLUSTERS,
        kind=np.arange(devices) % kinds,
    )


def owners(
    label: NDArray[Any], streamed: NDArray[np.bool_], devices: int, alpha: float, least: int, rng: np.random.Generator
) -> Rows:
    """(requests,) Drawn until every device has at least `least`, in the stream and fresh, as Li et al. (2022) do; at
    last, a device that has too few is given some of the one that has the most."""
    for _ in range(_DRAWS):
        owner = np.empty(len(label), np.intp)
        for one in np.unique(label):
            places = rng.permutation(np.flatnonzero(label == one))
            cuts = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * len(places)
            owner[places] = np.searchsorted(cuts.astype(np.intp), np.arange(len(places)), side="right")
        if all(
            np.bincount(owner[part], minlength=devices).min() >= least for part in (streamed, ~streamed) if part.any()
        ):
            return owner
    for part in filter(len, (np.flatnonzero(streamed), np.flatnonzero(~streamed))):
        while (counts := np.bincount(owner[part], minlength=devices)).min() < least:
            owner[part[owner[part] == counts.argmax()][0]] = counts.argmin()
    return owner


def skew(steps: Pool, drawn: Fleet) -> float:
    """How much the devices differ in their labels: the mean total variation between a device's shares of labels and
    the fleet's, 0 to 1."""
    taken = drawn.device >= 0
    table = np.zeros((drawn.devices, int(steps.data.label.max()) + 1))
    np.add.at(table, (drawn.device[taken], steps.data.label[taken]), 1)
    shares = table / table.sum(axis=1, keepdims=True)
    return float(np.abs(shares - table.sum(axis=0) / table.sum()).sum(axis=1).mean() / 2)
