"""Which uploads are aggregated, how much each counts, and how large it may be.

Refused, each with a reason: what can't be read, is for another model, has numbers that are not finite, changes nothing,
has another shape than the model's matrices, is larger than FAR times the median norm, has another frozen A (`ffa`), or
points away from the others. The edge does not have the model, so unless it is told the shapes, they are those of most
devices that adapt a matrix, and a matrix exists if more than a fifth of the devices adapt it.

What is left is clipped to CLIP times the median of ||Delta W||_F over all matrices together, and weights are capped so
that the fifth that claims most has no more than MOST_SHARE of them. That bounds what liars can do, whatever they send:
if those that are accepted have the share h of the weights, and H is the mean of the others, then

    ||aggregate - H||_F <= h (CLIP m + ||H||_F),

m being the median norm; and for a fifth of the devices (of four or more, one) h <= MOST_SHARE.

Direction is judged by one device, one vote: the cosine of a device's change with the sum of all others' unit changes.
Below OPPOSED it is left out, the worst first. That finds flipped signs where honest devices agree somewhat, which takes
equal starts. Random changes are not found, and need not be: they cancel out. A fifth that all send the same is a task
like any other, as far as can be seen, and stays within the bound; groups by similarity (`similar`) keep it apart. If
more than a quarter of the devices are opposed, there is no common direction, and nobody is left out for it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from models.adapter import Adapter, Factors
from protocol.errors import BadAdapter
from server.coordinator.combine import ceiling
from server.edge.adapters.delta import Doubles, Shape, Sketch, Sketcher, gram, norm, shape
from server.edge.adapters.strategies import Contribution, Strategy

CLIP = 1.5
FAR = 10.0
MOST_SHARE = 0.3
OPPOSED = -0.2  # sketches are wrong by a few hundredths
_MOST_OPPOSED = 0.25
_AGREED = 0.2  # of the devices must have a matrix, more than can be expected to lie
_LONGEST_NAME = 64


@dataclass(slots=True)
class _Seen:
    """What is kept of an adapter when it has been read."""

    contribution: Contribution
    shapes: dict[str, Shape]
    norm: float
    sketch: Sketch
    frozen: list[bytes]  # digests of the first 1, 2, .. rows of A; empty if A is not frozen


def screen(
    contributions: Iterable[Contribution],
    model: str,
    architecture: str,
    strategy: Strategy,
    shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
) -> tuple[list[Contribution], dict[str, str]]:
    """Those to aggregate with `strategy`, with their weights capped and their changes clipped, and why the others, by
    device, are refused. Reads each adapter once. `shapes`: (d_out, d_in) by matrix, if they are known. `seed`: of the
    sketches."""
    refused: dict[str, str] = {}
    seen: dict[str, _Seen] = {}
    look = _Look(model, architecture, strategy, Sketcher(seed))
    for contribution in contributions:
        if contribution.device in seen or contribution.device in refused:
            raise ValueError(f"two contributions of {contribution.device}")
        try:
            seen[contribution.device] = look(contribution)
        except BadAdapter as error:
            refused[contribution.device] = str(error)
    for reasons in (partial(_misshapen, shapes=shapes), _unlike_frozen, _too_large, _opposed):
        wrong = reasons(seen)
        refused |= wrong
        seen = {device: each for device, each in seen.items() if device not in wrong}
    return _bounded(list(seen.values()), strategy), refused


@dataclass(frozen=True, slots=True)
class _Look:
    """An adapter by itself."""

    model: str
    architecture: str
    strategy: Strategy
    sketcher: Sketcher

    def __call__(self, contribution: Contribution) -> _Seen:
        """Raises BadAdapter: what is wrong with it."""
        adapter = contribution.load()
        if adapter.model != self.model or adapter.architecture != self.architecture:
            raise BadAdapter(f"it is for another model ({adapter.model[:12]}), not for {self.model[:12]}")
        if not (math.isfinite(contribution.weight) and contribution.weight > 0.0):
            raise BadAdapter(f"its weight is {contribution.weight}, and must be finite and above 0")
        _check(adapter)
        judged = _shared_part(adapter) if self.strategy == "fedsa" else adapter
        with np.errstate(invalid="ignore", over="ignore"):
            size = norm(judged)
        if not (math.isfinite(size) and size > 0.0):
            raise BadAdapter("it changes nothing" if size == 0.0 else "it has numbers that are not finite")
        shapes = {name: shape(factors) for name, factors in adapter.factors.items()}
        frozen = _row_digests(adapter) if self.strategy == "ffa" else []
        return _Seen(contribution, shapes, size, self.sketcher(judged), frozen)


def _check(adapter: Adapter) -> None:
    if not (math.isfinite(adapter.alpha) and adapter.alpha > 0.0):
        raise BadAdapter(f"its alpha is {adapter.alpha}, and must be finite and above 0")
    for name, factors in adapter.factors.items():
        a, b = factors.a, factors.b
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
            raise BadAdapter(f"{_named(name)}: factors of {b.shape} and {a.shape} can't be multiplied")
    if adapter.centroid is not None and not np.isfinite(adapter.centroid).all():
        raise BadAdapter("its centroid has numbers that are not finite")


def _shared_part(adapter: Adapter) -> Adapter:
    """A as if it were a change by itself, of scale 1: its B is not shared."""
    factors = {
        name: Factors(each.a, np.eye(*each.b.shape, dtype=np.float32) * np.float32(each.a.shape[0] / adapter.alpha))
        for name, each in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def _row_digests(adapter: Adapter) -> list[bytes]:
    """Row i of all matrices after the rows before: equal at i means equal up to i."""
    digest = hashlib.sha256()
    digests = []
    for row in range(adapter.rank):
        for name in sorted(adapter.factors):
            a = adapter.factors[name].a
            digest.update(name.encode() + a[row].tobytes() if row < len(a) else b"")
        digests.append(digest.digest())
    return digests


def _misshapen(seen: Mapping[str, _Seen], shapes: Mapping[str, Shape] | None) -> dict[str, str]:
    right = _majority([each.shapes for each in seen.values()]) if shapes is None else shapes
    wrong = {}
    for device, each in seen.items():
        for name, is_ in each.shapes.items():
            if name not in right:
                wrong[device] = f"{_named(name)} is not a matrix of the model, as far as is known"
            elif is_ != right[name]:
                wrong[device] = f"{_named(name)} is {is_}, and must be {right[name]}"
    return wrong


def _majority(claims: Sequence[Mapping[str, Shape]]) -> dict[str, Shape]:
    votes: dict[str, Counter[Shape]] = {}
    for claim in claims:
        for name, is_ in claim.items():
            votes.setdefault(name, Counter())[is_] += 1
    found = {}
    for name, of_name in votes.items():
        (is_, most), total = of_name.most_common(1)[0], of_name.total()
        if most > total / 2 and most > _AGREED * len(claims):
            found[name] = is_
    return found


def _unlike_frozen(seen: Mapping[str, _Seen]) -> dict[str, str]:
    """Those whose A differs, in the rows that both have, from that of half of the devices or more."""
    all_ = [each.frozen for each in seen.values()]
    wrong = {}
    for device, each in seen.items():
        like = sum(_equal(each.frozen, other) for other in all_)
        if each.frozen and 2 * like <= len(all_):
            wrong[device] = "its A is not the frozen one of the others"
    return wrong


def _equal(one: Sequence[bytes], other: Sequence[bytes]) -> bool:
    both = min(len(one), len(other))
    return both > 0 and one[both - 1] == other[both - 1]


def _too_large(seen: Mapping[str, _Seen]) -> dict[str, str]:
    if not seen:
        return {}
    most = FAR * _middle([each.norm for each in seen.values()])
    return {
        device: f"its norm is {each.norm:.3g}, and at most {most:.3g} is allowed ({FAR:g} times the median)"
        for device, each in seen.items()
        if each.norm > most
    }


def _middle(norms: Sequence[float]) -> float:
    """The median; of an even number the lower one: of two devices one must not lift the bound for itself."""
    return sorted(norms)[(len(norms) - 1) // 2]


def _opposed(seen: Mapping[str, _Seen]) -> dict[str, str]:
    devices = list(seen)
    products = gram([each.sketch for each in seen.values()])
    # The exact norm counts against a change that the sketch does not show; no unit is longer than 1.
    lengths = np.maximum([each.norm for each in seen.values()], np.sqrt(products.diagonal()))
    units = products / np.outer(lengths, lengths)
    left = np.ones(len(devices), bool)
    wrong: dict[str, str] = {}
    while left.sum() > 1:
        cosines = np.where(left, _with_the_rest(units, left), 1.0)
        worst = int(cosines.argmin())
        if cosines[worst] >= OPPOSED:
            return wrong
        if len(wrong) + 1 > _MOST_OPPOSED * len(devices):
            return {}
        left[worst] = False
        wrong[devices[worst]] = f"it points away from the others (cosine {cosines[worst]:.2f})"
    return wrong


def _with_the_rest(units: Doubles, left: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Doubles:
    """(n,): the cosine of each with the sum of those that are left, without itself."""
    with_all = units @ left
    own = units.diagonal()
    rest = np.sqrt(np.maximum(left @ units @ left - 2.0 * with_all + own, 0.0))
    cosines: Doubles = (with_all - own) / np.maximum(rest * np.sqrt(own), 1e-12)
    return cosines


def _bounded(seen: Sequence[_Seen], strategy: Strategy) -> list[Contribution]:
    if not seen:
        return []
    heaviest = ceiling([each.contribution.weight for each in seen], MOST_SHARE)
    most = CLIP * _middle([each.norm for each in seen])
    bounded = []
    for each in seen:
        old = each.contribution
        load = partial(_scaled, old.load, most / each.norm, strategy) if each.norm > most else old.load
        bounded.append(Contribution(old.device, min(old.weight, heaviest), load))
    return bounded


def _scaled(load: Callable[[], Adapter], by: float, strategy: Strategy) -> Adapter:
    """The factor that the strategy is about, times `by`."""
    adapter = load()
    scaled = {
        name: replace(each, a=np.float32(by) * each.a)
        if strategy == "fedsa"
        else replace(each, b=np.float32(by) * each.b)
        for name, each in adapter.factors.items()
    }
    return replace(adapter, factors=scaled)


def _named(name: str) -> str:
    return repr(name[:_LONGEST_NAME])
