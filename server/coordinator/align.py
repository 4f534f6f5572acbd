"""From the clusters' reports to what holds for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.rounds import MAX_SUBJECTS, Group, Level, Overall, Report, Told, Whole, encode
from protocol.topics import OVERALL
from server.coordinator.combine import combine
from server.coordinator.groups import Grouping, plausible, pooled, regrouped


@dataclass(frozen=True, slots=True)
class AlignOptions:
    """`most_share`: of the weights, for a fifth of the clusters. `similarity`: devices are grouped by their statistics,
    into `groups` of them; 0: as many as there are."""

    most_share: float = 0.4
    similarity: bool = False
    groups: int = 0


def aligned(
    reports: Mapping[str, Report], groupings: Mapping[str, Grouping], last: int, number: int, options: AlignOptions
) -> tuple[dict[str, Whole], dict[str, Grouping]]:
    """By subject: the whole, and the grouping that its groups are from. `last`, `number`: of the last Overall and of
    the next."""
    wholes: dict[str, Whole] = {}
    kept: dict[str, Grouping] = {}
    for subject, told in _subjects(reports).items():
        level = combine([each.level for each in told], options.most_share)
        if level is None:
            continue
        wholes[subject] = Whole(level)
        if not options.similarity:
            continue
        grouping = regrouped(groupings.get(subject), pooled(each.sample for each in told), options.groups, number)
        if grouping is not None:
            kept[subject] = grouping
            wholes[subject] = _grouped(level, grouping, told, last, options.most_share)
    return wholes, kept


def _subjects(reports: Mapping[str, Report]) -> dict[str, list[Told]]:
    """Clusters in their order. Too many subjects: first those that most clusters tell of, so that one cluster that
    invents some displaces none that two share."""
    found: dict[str, list[Told]] = {}
    for _, report in sorted(reports.items()):
        for subject, told in report.subjects.items():
            found.setdefault(subject, []).append(told)
    order = sorted(found, key=lambda subject: (-len(found[subject]), subject))
    return {subject: found[subject] for subject in sorted(order[:MAX_SUBJECTS])}


def _grouped(level: Level, grouping: Grouping, told: Sequence[Told], last: int, most_share: float) -> Whole:
    """A group that nobody has told of yet starts from `level`, without evidence."""
    if len(grouping.centres) < 2:
        return Whole(level)
    count = len(grouping.centres)
    fitting = [each.groups for each in told if len(each.groups) == count and grouping.since <= each.overall <= last]
    groups = []
    for place, centre in enumerate(grouping.centres):
        own = combine([levels[place] for levels in fitting], most_share) or Level(level.threshold, 0.0, 0)
        groups.append(Group(own.threshold, own.evidence, own.devices, centre))
    return Whole(level, groups, grouping.scale)


def fitted(overall: Overall) -> Overall:
    """Without what does not fit into one message: first groups, then subjects, of those with the least evidence."""
    subjects = dict(overall.subjects)
    order = sorted(subjects, key=lambda subject: (subjects[subject].level.evidence, subject))
    smaller = [(subject, True) for subject in order if subjects[subject].groups] + [(each, False) for each in order]
    for subject, keep_level in smaller:
        if len(encode(Overall(overall.number, subjects))) <= OVERALL.limit:
            break
        if keep_level:
            subjects[subject] = Whole(subjects[subject].level)
        else:
            del subjects[subject]
    return Overall(overall.number, subjects)


def adopted(overall: Overall) -> dict[str, Grouping]:
    """Groupings to begin with, of a coordinator that has lost its own: those that a broker had kept. They are made
    anew as soon as there are samples, and keep their order."""
    found = {}
    for subject, whole in overall.subjects.items():
        centres = plausible([group.centre for group in whole.groups])
        if whole.scale and 2 <= len(centres) == len(whole.groups) and all(0.0 < unit < 1e6 for unit in whole.scale):
            middle = np.mean(centres, axis=0).tolist()
            found[subject] = Grouping(
                [each.tolist() for each in centres], whole.scale, middle, 0, 0.0, 0, overall.number
            )
    return found
