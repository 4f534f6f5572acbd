"""What one round found of one subject: the cluster's level, that of each group, and whose word was left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random

import msgspec
import numpy as np

from protocol.rounds import (
    MAX_SAMPLE,
    MAX_SUBJECTS,
    Agreed,
    Learned,
    Level,
    Overall,
    Report,
    Told,
    Whole,
    encode,
    nearest,
)
from protocol.sums import Sum
from protocol.topics import AGREED, REPORT
from server.edge.aggregate import TRIM, Floats, Method, aggregate, capped, discount, weigh

ENOUGH = 20  # devices, from which on one can be told to be far from the others
FAR = 0.3  # of the threshold's range: honest devices with other data are that far apart
DEVIATIONS = 6.0
RARE = 0.1  # of the devices
SAME = 0.1  # a device that says about the same twice means it


@dataclass(frozen=True, slots=True)
class Pending:
    """Updates of one subject that no aggregate has yet, n of them. `rounds`, `thresholds`, `evidence`: (n,);
    `statistics`: (n, 3), NaN where untold; `before`: (n,), what the device said the time before, NaN: nothing."""

    devices: list[str]
    rounds: Floats
    thresholds: Floats
    evidence: Floats
    statistics: Floats
    before: Floats


class Kept(msgspec.Struct, frozen=True):
    """What is agreed of a subject here, and the round that it is from."""

    told: Told
    round: int


@dataclass(frozen=True, slots=True)
class Recipe:
    method: Method = "trimmed"
    trim: float = TRIM


def conclude(
    pending: Pending, round: int, whole: Whole | None, overall: int, recipe: Recipe, least: int, random: Random
) -> tuple[Kept, list[str]]:
    """The outcome of `round`, and the devices whose updates were implausible. `whole`: of Overall number `overall`.
    Of fewer than `least` devices, also in a group, nothing is told: their level has none."""
    groups = _groups(pending, whole)
    wrong = implausible(pending.thresholds, pending.before, groups)
    at = np.flatnonzero(~wrong)
    lag = np.maximum(0.0, round - pending.rounds)
    members = [at[groups[at] == group] for group in range(len(whole.groups) if whole else 0)]
    found = [_level(pending, lag, of, recipe, least) for of in members]
    told = Told(
        _level(pending, lag, at, recipe, least),
        overall if found else 0,
        found,
        _sample(pending.statistics[at], random),
    )
    return Kept(told, round), [pending.devices[place] for place in np.flatnonzero(wrong)]


def implausible(thresholds: Floats, before: Floats, groups: np.ndarray) -> np.ndarray:
    """(n,) booleans: far from the others of its group, and not what the device said before either.

    Far: more than FAR and DEVIATIONS scaled median absolute deviations from the median, of at least ENOUGH devices.
    That alone would shut out honest devices whose data is unlike the others'. So if more than RARE of them are far,
    they are a kind of their own and not refused; and whoever says it again is believed. This catches accidents. Against
    malice the aggregate itself has to be robust.
    """
    wrong = np.zeros(len(thresholds), bool)
    for group in np.unique(groups):
        members = groups == group
        if members.sum() < ENOUGH:
            members = np.ones(len(thresholds), bool)
        if members.sum() >= ENOUGH:
            middle = np.median(thresholds[members])
            spread = 1.4826 * np.median(np.abs(thresholds[members] - middle))  # s, were they normal
            far = members & (np.abs(thresholds - middle) > max(FAR, DEVIATIONS * spread))
            if far.sum() <= RARE * members.sum():
                wrong |= (groups == group) & far & ~(np.abs(thresholds - before) <= SAME)
    return wrong


def _groups(pending: Pending, whole: Whole | None) -> np.ndarray:
    """(n,): each device's place in `whole.groups`, -1: none."""
    if whole is None or not whole.groups:
        return np.full(len(pending.devices), -1)
    rows = pending.statistics.tolist()
    return np.array([-1 if math.isnan(sum(row)) else nearest(row, whole) for row in rows])


def _level(pending: Pending, lag: Floats, at: np.ndarray, recipe: Recipe, least: int) -> Level:
    """Of the devices `at`. Its evidence is what counted: capped, and less if it was late."""
    if at.size < max(1, least):
        return Level(0.0, 0.0, 0)
    weights = weigh(pending.evidence[at], lag[at], recipe.method)
    threshold = aggregate(pending.thresholds[at, None], weights, recipe.method, recipe.trim)[0]
    evidence = (capped(pending.evidence[at]) * discount(lag[at])).sum()
    return Level(float(np.clip(threshold, 0.0, 1.0)), float(min(evidence, 1e12)), int(at.size))


def _sample(statistics: Floats, random: Random) -> list[list[float]]:
    rows = statistics[~np.isnan(statistics).any(axis=1)]
    picked = random.sample(range(len(rows)), min(MAX_SAMPLE, len(rows)))
    return [[float(f"{value:.4g}") for value in rows[at].tolist()] for at in picked]


def conclude_secure(cohorts: Iterable[tuple[str, Sum]], round: int, recipe: Recipe, least: int) -> dict[str, Kept]:
    """By subject, of the means of whole cohorts: those of single devices are not known. Each cohort counts as many
    times as it has devices; for the weighted mean, by its evidence."""
    by_subject: dict[str, list[Sum]] = {}
    for subject, of in cohorts:
        by_subject.setdefault(subject, []).append(of)
    kept: dict[str, Kept] = {}
    for subject, sums in by_subject.items():
        if (devices := sum(of.devices for of in sums)) >= least:
            weights = [of.evidence if recipe.method == "mean" else of.devices for of in sums]
            threshold = aggregate([[of.threshold] for of in sums], weights, recipe.method, recipe.trim)[0]
            evidence = min(sum(of.evidence for of in sums), 1e12)
            sample = [of.statistics for of in sums if of.statistics][:MAX_SAMPLE]
            kept[subject] = Kept(Told(Level(float(threshold), evidence, devices), sample=sample), round)
    return kept


def merged(old: Mapping[str, Kept], new: Mapping[str, Kept], round: int) -> dict[str, Kept]:
    """As many as fit into one message, those that most devices spoke of, the less the longer ago. So a few devices that
    make subjects up do not push out what the others share."""
    kept = {**old, **new}
    rank = sorted(kept, key=lambda subject: -kept[subject].told.level.devices / (1 + round - kept[subject].round))
    return {subject: kept[subject] for subject in rank[:MAX_SUBJECTS]}


def agreed(number: int, round: int, kept: Mapping[str, Kept], overall: Overall | None) -> bytes:
    """The message; what does not fit is left out from the end."""
    wholes = overall.subjects if overall else {}
    subjects = {subject: Learned(of.told.level, wholes.get(subject)) for subject, of in kept.items()}
    subjects |= {subject: Learned(None, whole) for subject, whole in wholes.items() if subject not in kept}
    while True:
        subjects = dict(list(subjects.items())[:MAX_SUBJECTS])
        message = encode(Agreed(number, round, subjects))
        if len(message) <= AGREED.limit:
            return message
        subjects.popitem()


def report(number: int, kept: Mapping[str, Kept]) -> bytes:
    """The message, with samples as large as fit."""
    sample = MAX_SAMPLE
    while True:
        cut = {s: msgspec.structs.replace(of.told, sample=of.told.sample[:sample]) for s, of in kept.items()}
        message = encode(Report(number, cut))
        if len(message) <= REPORT.limit or not sample:
            return message
        sample //= 2
