"""Many devices' adapters as one, in a version for every rank.

With Delta W_k = s_k B_k A_k, s_k = alpha_k / r_k, and p_k a device's weight over the sum of all weights:

- `flexlora`: sum p_k Delta W_k, truncated by SVD to each rank (Bai et al. 2024, arXiv 2402.11505). The default.
- `flora`: sum p_k Delta W_k exactly, as stacked factors (Wang et al. 2024, arXiv 2409.05976). Every rank gets the same
  one; its own rank is that of all devices together, at most the matrix' smaller side, so it is for few devices.
- `hetlora`: the factors padded with zeros and averaged each by itself, weighted by p_k ||Delta W_k||_F, and cut to each
  rank (Cho et al. 2024, arXiv 2401.06432; there the norm alone). Not the mean of the changes: a baseline.
- `fedsa`: A alone is shared (FedSA-LoRA, Guo et al. 2025, arXiv 2410.01463). The result's B is zero, for the device to
  put its own in. Devices must start from the same A, those of lower rank from its first rows.
- `ffa`: A is frozen and the same on all devices, so that the mean of s_k B_k is exact, with noise too (FFA-LoRA, Sun et
  al. 2024, arXiv 2403.12313). Lower ranks have the first rows.

A matrix that a device has not adapted counts as unchanged by it, so that whoever is alone in changing one has no more
than its weight there. Only `fedsa` is a mean over those that have the row: padding would shrink A round by round.

Adapters are read one at a time, and once or, where the sums of all matrices together exceed ROOM, several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from models.adapter import MOST_RANK, Adapter, Factors, Floats
from protocol.errors import BadAdapter
from server.edge.adapters.delta import Shape, Sum, breakeven, norm, scale, shape

Strategy: TypeAlias = Literal["flexlora", "flora", "hetlora", "fedsa", "ffa"]

ROOM = 240 * 2**20  # bytes of sums at a time


@dataclass(frozen=True, slots=True)
class Contribution:
    """`weight`: positive, only ratios matter. `load` may be called several times."""

    device: str
    weight: float
    load: Callable[[], Adapter]


def aggregate(
    contributions: Iterable[Contribution], strategy: Strategy, ranks: Sequence[int], alpha: float
) -> dict[int, Adapter]:
    """One adapter for each of `ranks`, scaled with `alpha`. A matrix' rank may be lower, where there is no more to it.
    For contributions that were screened. Raises BadAdapter if they don't go together, ValueError if there are none,
    somebody has no weight, or a rank or alpha is not positive."""
    fleet = _Fleet(contributions)
    if not ranks or min(ranks) < 1 or not alpha > 0.0:
        raise ValueError(f"ranks and alpha must be positive, not {list(ranks)} and {alpha}")
    if strategy == "flora":
        stacked = fleet.adapter(_flora(fleet, alpha), alpha)
        return dict.fromkeys(ranks, stacked)
    make = {"flexlora": _flexlora, "hetlora": _hetlora, "fedsa": _fedsa, "ffa": _ffa}[strategy]
    return {rank: fleet.adapter(of_rank, alpha) for rank, of_rank in make(fleet, ranks, alpha).items()}


class _Fleet:
    """All contributions in the order of the devices' names: the result must not depend on who came first."""

    def __init__(self, contributions: Iterable[Contribution]) -> None:
        self._all = sorted(contributions, key=lambda each: each.device)
        weights = np.array([each.weight for each in self._all], np.float64)
        if not weights.size or not (np.isfinite(weights) & (weights > 0.0)).all():
            raise ValueError("there must be contributions, and all of them with a finite weight above 0")
        self._shares: list[float] = (weights / weights.max() / (weights / weights.max()).sum()).tolist()
        self._first: Adapter | None = None
        self._centroids: dict[str, Floats] = {}

    def read(self) -> Iterator[tuple[str, float, Adapter]]:
        """Device, share of the weight, adapter."""
        for each, share in zip(self._all, self._shares, strict=True):
            adapter = each.load()
            if self._first is None:
                self._first = Adapter(adapter.model, adapter.architecture, adapter.alpha, {})
            if (adapter.model, adapter.architecture) != (self._first.model, self._first.architecture):
                raise BadAdapter(f"the adapter of {each.device} is for another model than those of the others")
            if adapter.centroid is not None:
                self._centroids[each.device] = np.float32(share) * adapter.centroid
            yield each.device, share, adapter
            del adapter

    def adapter(self, factors: dict[str, Factors], alpha: float) -> Adapter:
        """Its centroid is the mean direction of all that have one."""
        assert self._first is not None  # somebody was read
        return Adapter(self._first.model, self._first.architecture, alpha, factors, self._centroid())

    def _centroid(self) -> Floats | None:
        if len({each.shape for each in self._centroids.values()}) != 1:
            return None
        mean = np.sum(list(self._centroids.values()), axis=0, dtype=np.float64)
        length = float(np.linalg.norm(mean))
        if length == 0.0:
            return None
        return np.asarray(mean / length, np.float32)


_ByRank: TypeAlias = dict[int, dict[str, Factors]]


def _flexlora(fleet: _Fleet, ranks: Sequence[int], alpha: float) -> _ByRank:
    made: _ByRank = {rank: {} for rank in ranks}
    for name, total in _sums(fleet, breakeven):
        b, a = total.truncated(max(ranks))
        for rank in made:
            kept = min(rank, a.shape[0])
            half = np.float32(np.sqrt(kept / alpha))  # 1 / (alpha / r), half of it on each side
            made[rank][name] = Factors(half * a[:kept], half * b[:, :kept])
    return made


def _flora(fleet: _Fleet, alpha: float) -> dict[str, Factors]:
    made = {}
    for name, total in _sums(fleet, min):
        b, a = total.stacked()
        if len(a) > MOST_RANK:
            raise BadAdapter(
                f"stacked, {name} has rank {len(a)}, and an adapter has at most {MOST_RANK}: "
                "aggregate fewer devices, or with flexlora"
            )
        half = np.float32(np.sqrt(a.shape[0] / alpha))
        made[name] = Factors(half * a, half * b)
    return made


def _sums(fleet: _Fleet, stacked: Callable[[Shape], int]) -> Iterator[tuple[str, Sum]]:
    """Each matrix' sum of p_k Delta W_k, as factors up to the rank that `stacked` gives for its shape.
    When the sums outgrow ROOM, the last matrices wait for the next reading."""
    done: set[str] = set()
    waiting = True
    while waiting:
        sums: dict[str, Sum] = {}
        put_off: set[str] = set()
        for device, share, adapter in fleet.read():
            for name, factors in adapter.factors.items():
                if name not in done and name not in put_off:
                    total = sums.setdefault(name, Sum(shape(factors), stacked(shape(factors))))
                    _add(total, name, device, share * scale(adapter, factors), factors)
            del adapter  # before the next one is read
            while len(sums) > 1 and sum(each.nbytes for each in sums.values()) > ROOM:
                put_off.add(sums.popitem()[0])
        done |= sums.keys()
        waiting = bool(put_off)
        for name in sorted(sums):
            yield name, sums.pop(name)


def _add(total: Sum, name: str, device: str, by: float, factors: Factors) -> None:
    try:
        total.add(np.float32(by) * factors.b, factors.a)
    except ValueError as error:
        raise BadAdapter(f"the adapter of {device} does not go with the others: {name}: {error}") from error


class _Padded:
    """Sums of factors by matrix: those of lower rank are padded with zeros."""

    def __init__(self) -> None:
        self.rows: dict[str, Floats] = {}  # (r, d)

    def add(self, name: str, device: str, rows: Floats) -> None:
        old = self.rows.get(name)
        if old is None:
            self.rows[name] = rows.copy()
            return
        if old.shape[1] != rows.shape[1]:
            raise BadAdapter(f"the adapter of {device} has {name} in another shape than the others")
        if len(old) < len(rows):
            old, rows = rows.copy(), old
        old[: len(rows)] += rows
        self.rows[name] = old


def _hetlora(fleet: _Fleet, ranks: Sequence[int], alpha: float) -> _ByRank:
    ins, outs = _Padded(), _Padded()
    total = 0.0
    for device, share, adapter in fleet.read():
        weight = share * norm(adapter)
        total += weight
        for name, factors in adapter.factors.items():
            ins.add(name, device, np.float32(weight) * factors.a)
            outs.add(name, device, np.float32(weight * scale(adapter, factors)) * factors.b.T)
    by = np.float32(1.0 / total if total > 0.0 else 0.0)
    means = {name: (by * rows, by * outs.rows[name]) for name, rows in ins.rows.items()}
    return _cut(means, ranks, alpha)


def _fedsa(fleet: _Fleet, ranks: Sequence[int], alpha: float) -> _ByRank:
    ins, held = _Padded(), _Padded()
    outs: dict[str, int] = {}
    for device, share, adapter in fleet.read():
        for name, factors in adapter.factors.items():
            ins.add(name, device, np.float32(share) * factors.a)
            held.add(name, device, np.full((len(factors.a), 1), share, np.float32))
            if outs.setdefault(name, len(factors.b)) != len(factors.b):
                raise BadAdapter(f"the adapter of {device} has {name} in another shape than the others")
    means = {
        name: (rows / held.rows[name], np.zeros((len(rows), outs[name]), np.float32)) for name, rows in ins.rows.items()
    }
    return _cut(means, ranks, alpha)


def _ffa(fleet: _Fleet, ranks: Sequence[int], alpha: float) -> _ByRank:
    frozen: dict[str, Floats] = {}
    outs = _Padded()
    for device, share, adapter in fleet.read():
        for name, factors in adapter.factors.items():
            known = frozen.setdefault(name, factors.a)
            if not np.array_equal(*same_rows(known, factors.a)):
                raise BadAdapter(f"the adapter of {device} has another A than the others, so B has no mean: {name}")
            frozen[name] = max(known, factors.a, key=len)
            outs.add(name, device, np.float32(share * scale(adapter, factors)) * factors.b.T)
    return _cut({name: (a, outs.rows[name]) for name, a in frozen.items()}, ranks, alpha)


def same_rows(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """The rows that both have."""
    both = min(len(one), len(other))
    return one[:both], other[:both]


def _cut(means: dict[str, tuple[Floats, Floats]], ranks: Sequence[int], alpha: float) -> _ByRank:
    """The first rows of A (R, d_in) and of s B^T (R, d_out)."""
    made: _ByRank = {rank: {} for rank in ranks}
    for name, (ins, outs) in means.items():
        for rank, of_rank in made.items():
            kept = min(rank, len(ins))
            of_rank[name] = Factors(ins[:kept].copy(), np.float32(kept / alpha) * outs[:kept].T)
    return made
