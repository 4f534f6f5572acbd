"""Groups of similar devices, found in samples of their statistics (protocol.rounds.STATISTICS).

k-means (Lloyd 1982) with k-means++ starts (Arthur and Vassilvitskii 2007) on standardised statistics. How many groups
there are is either given or decided by the mean silhouette (Rousseeuw 1987): below 0.5 there is no structure worth the
name (Kaufman and Rousseeuw 1990, table 4), and all devices are one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from protocol.rounds import MAX_GROUPS, STATISTICS

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

MOVED = 0.5  # in units of the scale: how far the samples may move before groups are made anew
STRUCTURE = 0.5  # the least silhouette of groups

_LOWEST = np.array([0.0, 0.0, -100.0])  # of statistics; a device that tells of others is broken
_HIGHEST = np.array([1.0, 1.0, 100.0])
_FINEST = 0.01  # smaller differences are noise
_FAR = 3.0  # scales; what is further from the middle counts as this far
_MOST = 512  # samples
_FEWEST = 8
_STARTS = 8
_STEPS = 50
_SMALLEST = 0.02  # of the samples: a group with less is of outliers


class Grouping(msgspec.Struct, frozen=True):
    """Centres (in the statistics' own units), what distances are divided by, and what they were made of: the middle of
    the samples, their number, and their mean distance from the nearest centre. One centre: there are no groups.
    `wanted`: as in `regrouped`. `since`: number of the first Overall with these groups."""

    centres: list[list[float]]
    scale: list[float]
    middle: list[float]
    count: int
    spread: float
    wanted: int
    since: int


def pooled(samples: Iterable[Sequence[Sequence[float]]]) -> Floats:
    """(n, 3): one cluster's sample after the other, in turn, so that all have the same share if they are too many.
    What can't be true is left out."""
    turns = chain.from_iterable(zip_longest(*(plausible(sample) for sample in samples)))
    rows = [row for row, _ in zip((row for row in turns if row is not None), range(_MOST), strict=False)]
    return np.array(rows, np.float64).reshape(-1, len(STATISTICS))


def plausible(sample: Sequence[Sequence[float]]) -> list[Floats]:
    rows = np.array(sample, np.float64).reshape(-1, len(STATISTICS))
    return list(rows[((rows >= _LOWEST) & (rows <= _HIGHEST)).all(axis=1)])


def regrouped(old: Grouping | None, samples: Floats, wanted: int, number: int) -> Grouping | None:
    """The groups of the samples (n, 3): `old` as long as they still fit, else new ones, in the order of those they
    take the place of. `wanted`: how many; 0: as many as there are. `number`: of the next Overall. None: too few
    samples so far."""
    stays = old is not None and old.wanted == wanted and not moved(old, samples)
    if stays or len(samples) < max(_FEWEST, 3 * wanted):
        return old
    scale = _scale(samples)
    middle = np.median(samples, axis=0)
    points = _standardised(samples, middle, scale)
    centres = k_means(points, wanted) if wanted else _natural(points)
    if old is not None:
        centres = centres[_order(_standardised(old.centres, middle, scale), centres)]
    spread = float(_distances(points, centres).min(axis=1).mean())
    new = Grouping(
        (centres * scale + middle).tolist(), scale.tolist(), middle.tolist(), len(points), spread, wanted, number
    )
    same = old is not None and (old.centres, old.scale) == (new.centres, new.scale)
    return msgspec.structs.replace(new, since=old.since) if old is not None and same else new


def moved(old: Grouping, samples: Floats) -> bool:
    """Whether there are twice as many samples, they lie wider about the centres, or those of one centre have moved
    away from it, by more than MOVED."""
    if len(samples) > 2 * old.count:
        return True
    points, centres = (_standardised(rows, old.middle, old.scale) for rows in (samples, old.centres))
    distances = _distances(points, centres)
    if distances.min(axis=1).mean() > old.spread + MOVED:
        return True
    places = distances.argmin(axis=1)
    mine = [points[places == place] for place in range(len(centres))]
    return any(
        len(own) >= _FEWEST and np.linalg.norm(own.mean(axis=0) - centre) > MOVED
        for own, centre in zip(mine, centres, strict=True)
    )


def _standardised(rows: ArrayLike, middle: ArrayLike, scale: ArrayLike) -> Floats:
    rows, middle, scale = (np.asarray(each, np.float64) for each in (rows, middle, scale))
    standard: Floats = np.clip((rows - middle) / scale, -_FAR, _FAR)
    return standard


def k_means(points: Floats, k: int, seed: int = 0) -> Floats:
    """(k, d): the best of several starts. Fewer, if there are fewer different points."""
    random = np.random.default_rng(seed)
    tried = [_lloyd(points, _plus_plus(points, k, random)) for _ in range(_STARTS)]
    return min(tried, key=lambda centres: float((_distances(points, centres).min(axis=1) ** 2).sum()))


def _plus_plus(points: Floats, k: int, random: np.random.Generator) -> Floats:
    """Each further centre is a point, drawn in proportion to its squared distance from those chosen already."""
    chosen = [points[random.integers(len(points))]]
    while len(chosen) < k:
        squared = _distances(points, np.array(chosen)).min(axis=1) ** 2
        if squared.sum() <= 0.0:
            break
        chosen.append(points[random.choice(len(points), p=squared / squared.sum())])
    return np.array(chosen)


def _lloyd(points: Floats, centres: Floats) -> Floats:
    for _ in range(_STEPS):
        places = _distances(points, centres).argmin(axis=1)
        own = [points[places == at] for at in range(len(centres))]
        means = np.array([mine.mean(axis=0) if len(mine) else old for mine, old in zip(own, centres, strict=True)])
        if np.array_equal(means, centres):
            break
        centres = means
    return centres


def _natural(points: Floats) -> Floats:
    """As many centres as the silhouette finds, or one."""
    best = STRUCTURE
    centres: Floats = points.mean(axis=0, keepdims=True)
    apart = _distances(points, points)
    for k in range(2, MAX_GROUPS + 1):
        tried = k_means(points, k)
        places = _distances(points, tried).argmin(axis=1)
        sizes = np.bincount(places, minlength=len(tried))
        if len(tried) < k or sizes.min() < max(2, _SMALLEST * len(points)):
            continue
        value = silhouette(apart, places)
        if value > best:
            best, centres = value, tried
    return centres


def silhouette(apart: Floats, places: Places) -> float:
    """Mean over the points of (b - a) / max(a, b): a, the mean distance from the others of its own group; b, from those
    of the nearest other group. `apart` (n, n): distances. `places` (n,): the group of each, of at least two."""
    member = places[:, None] == np.unique(places)[None, :]
    sizes = member.sum(axis=0)
    sums = apart @ member
    own = (sums * member).sum(axis=1) / np.maximum(member @ sizes - 1, 1)
    other = np.where(member, np.inf, sums / sizes).min(axis=1)
    values = (other - own) / np.maximum(np.maximum(own, other), 1e-12)
    return float(np.where(member @ sizes > 1, values, 0.0).mean())


def _scale(samples: Floats) -> Floats:
    """Standard deviations of the middle 80 %, so that a few absurd devices do not make all others look alike."""
    low, high = np.quantile(samples, [0.1, 0.9], axis=0)
    scale: Floats = np.maximum(np.clip(samples, low, high).std(axis=0), _FINEST)
    return scale


def _distances(points: Floats, centres: Floats) -> Floats:
    """(n, k)"""
    apart: Floats = np.linalg.norm(points[:, None, :] - centres[None, :, :], axis=2)
    return apart


def _order(old: Floats, new: Floats) -> list[int]:
    """The new centres in the order of the old ones that they are nearest to, pair by pair; those without one come
    last."""
    apart = _distances(old, new)
    place_of: dict[int, int] = {}
    for at in np.argsort(apart, axis=None, kind="stable"):
        before, after = divmod(int(at), len(new))
        if before not in place_of.values() and after not in place_of:
            place_of[after] = before
    return sorted(range(len(new)), key=lambda after: place_of.get(after, len(old) + after))
