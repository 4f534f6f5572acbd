"""Groups of devices that have learned similar things, by the cosine of their changes Delta W.

Agglomerative clustering with average linkage (Sokal and Michener 1958) on 1 - cosine. How many groups there are is
decided by the mean silhouette (Rousseeuw 1987); below STRUCTURE, or with fewer than _FEWEST devices, all are one group.
Distances in many dimensions are all alike, so STRUCTURE is lower than in server.coordinator.groups: 0.25, where Kaufman
and Rousseeuw (1990, table 4) see the first signs of it. A device that is merged with nobody at the chosen level, or
whose own silhouette is below FITS, is in no group.

Two devices of different ranks are compared by the first rows of the larger one's A, as many as the other has. Those
are what they started from together (in the first round the same random rows, later the largest directions); with all
rows, devices would be grouped by their ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.rounds import MAX_GROUPS
from server.edge.adapters.delta import Doubles, Sketch, Sketcher, gram
from server.edge.adapters.strategies import Contribution

Labels = NDArray[np.intp]  # (n,): the group of each, or _NOWHERE

STRUCTURE = 0.25
FITS = STRUCTURE / 2
STAYS = 0.1  # of silhouette: so much better must new groups be than those before
_FEWEST = 4
_NOWHERE = -1


def groups(
    contributions: Iterable[Contribution], before: Sequence[Sequence[str]] | None = None, seed: int = 0
) -> list[list[str]]:
    """Devices by group, in the order of the groups `before` (those of the last round) that they share most devices
    with; new ones come last. Those before are kept as long as new ones are not clearly better. Only devices that
    contributed are in the result. Reads each adapter once."""
    everyone = sorted(contributions, key=lambda each: each.device)
    sketcher = Sketcher(seed)
    devices = [each.device for each in everyone]
    apart = distances([sketcher(each.load()) for each in everyone])
    labels, value = _found(apart)
    if before:
        old = _placed(apart, devices, before)
        if old is not None and _value(apart, old) >= value - STAYS:
            labels = old
    found: dict[int, list[str]] = {}
    for device, label in zip(devices, labels.tolist(), strict=True):
        if label != _NOWHERE:
            found.setdefault(label, []).append(device)
    return _ordered(list(found.values()), before or [])


def distances(sketches: Sequence[Sketch]) -> Doubles:
    """(n, n): 1 - cosine."""
    ranks = np.array([max((factors.rank for factors in sketch.values()), default=0) for sketch in sketches])
    both = np.minimum.outer(ranks, ranks)
    apart = np.zeros(both.shape)
    for rank in np.unique(ranks).tolist():
        products = gram(sketches, rank)
        lengths = np.sqrt(np.maximum(products.diagonal(), np.finfo(np.float64).tiny))
        apart = np.where(both == rank, 1.0 - products / np.outer(lengths, lengths), apart)
    np.fill_diagonal(apart, 0.0)
    return np.clip(apart, 0.0, 2.0)


def _found(apart: Doubles) -> tuple[Labels, float]:
    """The best groups, and their silhouette; one group counts as STRUCTURE."""
    count = len(apart)
    best, value = np.zeros(count, np.intp), STRUCTURE
    if count < _FEWEST:
        return best, value
    for labels in _levels(apart):
        alone = np.bincount(labels, minlength=count)[labels] == 1
        if len(np.unique(labels[~alone])) <= MAX_GROUPS:
            tried = np.where(alone, _NOWHERE, labels)
            reached = _value(apart, tried)
            if reached > value:
                best, value = tried, reached
    if value > STRUCTURE:
        best = np.where(silhouettes(apart, best) < FITS, _NOWHERE, best)
    return best, value


def _levels(apart: Doubles) -> list[Labels]:
    """The labels after each merge of the two groups with the smallest mean distance, from n - 1 groups to 2."""
    means = apart.copy()
    np.fill_diagonal(means, np.inf)
    labels = np.arange(len(apart))
    sizes = np.ones(len(apart))
    levels = []
    for _ in range(len(apart) - 2):
        one, other = sorted(divmod(int(means.argmin()), len(apart)))
        mean = (sizes[one] * means[one] + sizes[other] * means[other]) / (sizes[one] + sizes[other])
        mean[one] = np.inf
        means[one], means[:, one] = mean, mean
        means[other], means[:, other] = np.inf, np.inf
        sizes[one] += sizes[other]
        labels = np.where(labels == other, one, labels)
        levels.append(labels)
    return levels


def _value(apart: Doubles, labels: Labels) -> float:
    return STRUCTURE if len(np.unique(labels)) == 1 else float(silhouettes(apart, labels).mean())


def silhouettes(apart: Doubles, labels: Labels) -> Doubles:
    """(n,): (b - a) / max(a, b) of each; a, its mean distance from the others of its group; b, from those of the
    nearest other group. Who is alone or nowhere has 0, and counts as a group for the others. At least two groups."""
    alone = len(labels) + np.arange(len(labels))
    member = np.where(labels == _NOWHERE, alone, labels)
    member = member[:, None] == np.unique(member)[None, :]
    sums, sizes = apart @ member, member.sum(axis=0)
    others = member @ sizes - 1
    own = (sums * member).sum(axis=1) / np.maximum(others, 1)
    nearest = np.where(member, np.inf, sums / sizes).min(axis=1)
    values: Doubles = np.where(others > 0, (nearest - own) / np.maximum(np.maximum(own, nearest), 1e-12), 0.0)
    return values


def _placed(apart: Doubles, devices: Sequence[str], before: Sequence[Sequence[str]]) -> Labels | None:
    """The groups before with the devices of today. Who is new joins the group that it is nearest to, if it is no
    further from it than its members are from each other. None: nobody of them is here."""
    group_of = {device: at for at, group in enumerate(before) for device in group}
    labels = np.array([group_of.get(device, _NOWHERE) for device in devices], np.intp)
    members = {at: labels == at for at in np.unique(labels).tolist() if at != _NOWHERE}
    if not members:
        return None
    for new in np.flatnonzero(labels == _NOWHERE):
        distance, nearest = min((float(apart[new, mine].mean()), at) for at, mine in members.items())
        mine = members[nearest]
        if distance <= apart[np.ix_(mine, mine)].max():
            labels[new] = nearest
    return labels


def _ordered(found: list[list[str]], before: Sequence[Sequence[str]]) -> list[list[str]]:
    """Pair by pair, those that share most first."""
    shared = [
        (len(set(group) & set(old)) / len(set(group) | set(old)), -at_old, -at)
        for at_old, old in enumerate(before)
        for at, group in enumerate(found)
        if set(group) & set(old)
    ]
    place: dict[int, int] = {}
    for _, at_old, at in sorted(shared, reverse=True):
        if -at not in place and -at_old not in place.values():
            place[-at] = -at_old
    return [found[at] for at in sorted(range(len(found)), key=lambda at: place.get(at, len(before) + at))]
