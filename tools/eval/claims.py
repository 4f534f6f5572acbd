"""What must hold, and whether it does: each claim is a difference between arms at equal share, or in regret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tools.eval.curves import Bench, Curve, Estimate

INSIDE = (0.02, 0.98)  # shares at which a point says something about its arm

Json = dict[str, Any]
Curves = Mapping[str, Curve]


def claims(curves: Curves, bench: Bench) -> Json:
    """By name: the claim in words, its figures with intervals, and `holds`: True, False, or None where the interval
    leaves it open."""
    return {
        "federated_reaches_static": {
            "claim": "federated is at least the best static threshold at equal LLM share, within the interval",
            "holds": _not_below(_lift(curves, "federated")),
            "flat": _json(_lift(curves, "federated")),
            "clusters": _json(_lift(curves, "federated_clusters")),
            "similar": _json(_lift(curves, "federated_similar")),
            "flat_weighted_mean": _json(_lift(curves, "federated_mean")),
            "flat_without_its_audits": _json(_frozen_lift(curves["federated"], bench)),
            "flat_regret": _json(_regret(curves["federated"], bench)),
            "flat_regret_that_the_weighted_mean_spares": _json(
                _regret_difference(curves, "federated", "federated_mean", bench)
            ),
        },
        "personal_beats_global": {
            "claim": "personal thresholds are better than one for all, at equal LLM share",
            "holds": _above(_difference(curves, "federated_clusters", "federated")),
            "clusters": _json(_difference(curves, "federated_clusters", "federated")),
            "similar": _json(_difference(curves, "federated_similar", "federated")),
            "clusters_regret": _json(_regret_difference(curves, "federated", "federated_clusters", bench)),
            "best_per_device_by_its_stream": _json(_lift(curves, "per_device_stream")),
            "best_per_device_in_hindsight": _json(_lift(curves, "per_device")),
        },
        "federated_beats_alone": {
            "claim": "federated is better than each device alone, with few requests per device",
            "holds": _above(_regret_difference(curves, "local", "federated_clusters", bench)),
            "quality_at_equal_share": _json(_difference(curves, "federated_clusters", "local")),
            "regret_spared": _json(_regret_difference(curves, "local", "federated_clusters", bench)),
            "regret_by_round": _by_round(curves, bench.plain()),
        },
        "head_beats_scalar": {
            "claim": "a router head on several features is better than one threshold on u, at equal LLM share",
            "holds": _above(_lift(curves, "router_head")),
            "over_static": _json(_lift(curves, "router_head")),
            "over_federated": _json(_difference(curves, "router_head", "federated")),
            "over_federated_personal": _json(_difference(curves, "router_head", "federated_similar")),
            "over_head_on_u_alone": _json(_difference(curves, "router_head", "router_head_u")),
            "regret_spared": _json(_regret_difference(curves, "federated", "router_head", bench)),
            "regret_spared_on_u_alone": _json(_regret_difference(curves, "federated", "router_head_u", bench)),
        },
    }


def _lift(curves: Curves, name: str) -> Estimate | None:
    """Mean over the arm's points inside the range of shares."""
    return _mean(curves[name], curves[name])


def _difference(curves: Curves, one: str, other: str) -> Estimate | None:
    """Of two arms' lifts, setting by setting: each at its own share against the static threshold's at that share."""
    a, b = _mean(curves[one], curves[other]), _mean(curves[other], curves[one])
    return None if a is None or b is None else a - b


def _mean(curve: Curve, other: Curve) -> Estimate | None:
    """Mean lift of `curve` over the settings at which both are inside."""
    inside = _inside(curve) & _inside(other) if curve.arm.settings == other.arm.settings else _inside(curve)
    return Estimate(curve.mean(curve.points.lift)[:, inside].mean(axis=1)) if inside.any() else None


def _inside(curve: Curve) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray((curve.share[0] > INSIDE[0]) & (curve.share[0] < INSIDE[1]))


def _frozen_lift(curve: Curve, bench: Bench) -> Estimate | None:
    """The threshold alone, had it been learned and audits ended."""
    frozen = bench.curve(curve.arm, [[replace(one, audit=0.0) for one in own] for own in curve.runs])
    return _mean(frozen, frozen)


def _regret(curve: Curve, bench: Bench) -> Estimate:
    return Estimate(bench.regret(curve).mean(axis=1))


def _regret_difference(curves: Curves, worse: str, better: str, bench: Bench) -> Estimate:
    return _regret(curves[worse], bench) - _regret(curves[better], bench)


def _by_round(curves: Curves, bench: Bench) -> Json:
    """Mean regret of what was learned after each round, audits left out."""
    found = {}
    for name in (
        "local",
        "federated",
        "federated_clusters",
        "federated_similar",
        "centralised",
        "router_head",
        "router_head_u",
    ):
        curve = curves[name]
        rows = []
        for at in range(len(curve.runs[0][0].by_round)):
            runs = [
                [replace(one, asked=one.by_round[at].astype(float), audit=0.0) for one in own] for own in curve.runs
            ]
            rows.append(round(_regret(bench.curve(curve.arm, runs), bench).value, 4))
        found[name] = rows
    return found


def _above(estimate: Estimate | None) -> bool | None:
    if estimate is None:
        return None
    low, high = estimate.interval
    return True if low > 0 else False if high <= 0 else None


def _not_below(estimate: Estimate | None) -> bool | None:
    return None if estimate is None else estimate.interval[1] >= 0


def _json(estimate: Estimate | None) -> Json | None:
    if estimate is None:
        return None
    low, high = estimate.interval
    return {"value": round(estimate.value, 4), "ci": [round(low, 4), round(high, 4)]}
