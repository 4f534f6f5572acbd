"""All arms on one pool of steps: their curves, what they cost, and whether the claims hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.eval.arms import Arm, arms, run
from tools.eval.claims import claims
from tools.eval.curves import Bench, Curve, Estimate, least_share
from tools.eval.fleets import ROUNDS, Fleet, Pool, fleet, skew

CLOSE = 0.003  # of quality: "within 0.3 points"
SETTLED = 0.02  # of the decisions about fresh steps: what may still change after convergence

Json = dict[str, Any]


def compare(steps: Pool, *, devices: int, alpha: float, seeds: int, first_seed: int = 0) -> Json:
    """One entry of `pairs` in the JSON of `skerry eval news` and `text`. Raises ConfigError if there are too few
    documents."""
    numbers = range(first_seed, first_seed + seeds)
    fleets = [fleet(steps, devices, alpha, seed) for seed in numbers]
    bench = Bench(steps, fleets, first_seed)
    curves = {arm.name: _curve(arm, steps, fleets, numbers, bench) for arm in arms(steps)}
    best = max(float(curve.quality[0].max()) for curve in curves.values() if not curve.arm.hindsight)
    wanted = max(bench.llm.value, best) - CLOSE
    return {
        "slm": steps.data.slm,
        "llm": steps.data.llm,
        "arms": {name: _arm(curve, bench, fleets, wanted) for name, curve in curves.items()},
        "claims": claims(curves, bench),
        "data": _data(steps, fleets, bench, alpha, wanted),
    }


def _curve(arm: Arm, steps: Pool, fleets: Sequence[Fleet], seeds: Sequence[int], bench: Bench) -> Curve:
    runs = [
        [run(arm, steps, drawn, setting, seed) for setting in arm.settings]
        for seed, drawn in zip(seeds, fleets, strict=True)
    ]
    return bench.curve(arm, runs)


def _arm(curve: Curve, bench: Bench, fleets: Sequence[Fleet], wanted: float) -> Json:
    """The entry of one arm under `arms`."""
    low, high = curve.area.interval
    return {
        "title": curve.arm.title,
        "knob": curve.arm.knob,
        "hindsight": curve.arm.hindsight,
        "auc": _round(curve.area.value),
        "auc_ci": [_round(low), _round(high)],
        "close_share": _round(least_share(curve.share[0], curve.quality[0], bench.slm.value, bench.llm.value, wanted)),
        "rounds_to_converge": _converged(curve),
        "points": [_point(curve, at, fleets) for at in range(len(curve.arm.settings))],
    }


def _point(curve: Curve, at: int, fleets: Sequence[Fleet]) -> Json:
    """Means over seeds. `tokens`: of the fresh steps, by who wrote them. `bytes`: of the whole run, stream included."""
    runs = [own[at] for own in curve.runs]
    costs = {name: round(float(np.mean([one.bytes[name] for one in runs]))) for name in runs[0].bytes}
    told = curve.arm.make is not None
    steps = sum(one.stream["steps"] for one in runs)
    sent = sum(one.stream["escalations"] + one.stream["audits"] for one in runs)
    memory = float(np.mean([one.memory.sum() for one in runs]))
    cloud = float(np.mean([one.sent.sum() for one in runs]))
    return {
        curve.arm.knob or "setting": curve.arm.settings[at],
        "llm_share": _round(float(curve.share[0, at])),
        "quality": _round(float(curve.quality[0, at])),
        "ci": [_round(edge) for edge in Estimate(curve.quality[:, at]).interval],
        "agreement": _round(float(curve.mean(curve.points.agreement)[0, at])),
        "lift": _round(float(curve.mean(curve.points.lift)[0, at])),
        "bytes_total": sum(costs.values()),
        "bytes": costs,
        "bytes_per_device_and_round": _round(costs["rounds"] / fleets[0].devices / ROUNDS) if told else 0.0,
        "tokens": {
            "local": round(float(np.mean([len(one.asked) for one in runs])) - cloud - memory),
            "memory": round(memory),
            "cloud": round(cloud),
        },
        "audits": _round(float(np.mean([(one.sent - one.asked).mean() for one in runs]))),
        "stream": {
            "llm_share": _round(sent / steps),
            "audits": _round(sum(one.stream["audits"] for one in runs) / steps),
            "quality": _round(sum(one.stream["right"] for one in runs) / steps),
            "agreement": _round(sum(one.stream["agree"] for one in runs) / steps),
        },
    }


def _converged(curve: Curve) -> float | None:
    """The first round from which on no more than SETTLED of the decisions about fresh steps differ from the last
    round's, mean over settings and seeds. None: nothing is learned in rounds."""
    if curve.arm.make is None:
        return None
    found = []
    for one in (one for own in curve.runs for one in own):
        changed = (one.by_round != one.by_round[-1]).mean(axis=1) > SETTLED
        found.append(int(np.flatnonzero(changed).max(initial=-1)) + 2)
    return _round(float(np.mean(found)))


def _data(steps: Pool, fleets: Sequence[Fleet], bench: Bench, alpha: float, wanted: float) -> Json:
    data = steps.data
    shares = [np.bincount(one.device[one.device >= 0], minlength=one.devices) for one in fleets]
    measures = {
        "entropy": data.u,
        "entropy, the other": data.u_other,
        "1 - p_max": 1 - data.p_max,
        "1 - margin": 1 - data.margin,
        "temperature": data.temperature,
    }
    return {
        "steps": len(data.u),
        "fresh_steps": round(float(np.mean([len(one.fresh) for one in fleets]))),
        "requests": len(np.unique(steps.request)),
        "documents": len(np.unique(data.document)),
        "labels": list(data.labels),
        "devices": fleets[0].devices,
        "clusters": len(np.unique(fleets[0].cluster)),
        "alpha": alpha,
        "skew": _round(float(np.mean([skew(steps, one) for one in fleets]))),
        "steps_per_device": [
            round(float(np.mean([s.min() for s in shares]))),
            round(float(np.mean([s.max() for s in shares]))),
        ],
        "seeds": len(fleets),
        "rounds": ROUNDS,
        "slm_only": _estimate(bench.slm),
        "llm_only": _estimate(bench.llm),
        "close_to": _round(wanted),
        "differs": _round(float(data.differs.mean())),
        "mean_beta": _round(float(data.beta.mean())),
        "static_auc_by_measure": {name: _estimate(bench.static_area(u)) for name, u in measures.items()},
    }


def _estimate(estimate: Estimate) -> Json:
    return {"value": _round(estimate.value), "ci": [_round(edge) for edge in estimate.interval]}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
