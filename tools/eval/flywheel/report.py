"""From what the arms did to the figures of `skerry eval flywheel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tools.eval.flywheel.play import ARMS, Played
from tools.eval.flywheel.stream import Rows, Stream
from tools.eval.flywheel.traffic import Traffic

Json = dict[str, Any]

_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)


def points(stream: Stream, played: Played) -> list[Json]:
    """One of each round: what was answered in it, and the bytes since the beginning."""
    found, items = [], 0
    for at, rows in enumerate(stream.rounds):
        items += len(rows)
        found.append(
            {
                "items": items,
                "llm_share": _mean(played.llm[rows]),
                "memory_share": _mean(played.memory[rows]),
                "accuracy": _mean(played.answer[rows] == stream.label[rows]),
                "accuracy_alone": _mean(played.alone[rows] == stream.label[rows]),
                "bytes_total": sum(played.bytes[at].values()),
                "bytes": played.bytes[at],
                "adapters": len(set(played.adapters[at]) - {""}),
            }
        )
    return found


def reference(stream: Stream, traffic: Traffic, *, llm: bool, draft: Rows) -> Played:
    """The arm that always asks, or never does."""
    asked = np.full(len(stream.label), llm)
    answer = stream.said if llm else draft
    played = Played(asked, ~asked & False, answer, draft)
    sent = 0
    for rows in stream.rounds:
        if llm:
            said = stream.said
            sent += sum(traffic.asked(row, int(draft[row]), int(said[row])) for row in rows.tolist())
        played.bytes.append({"cloud": sent})
        played.adapters.append([""] * stream.devices)
    return played


def arm(stream: Stream, name: str, title: str, played: Played, llm: Played, seed: int) -> Json:
    last = np.concatenate(stream.rounds[-max(1, len(stream.rounds) // 5) :])
    right = (played.answer == stream.label)[last]
    against = right.astype(float) - (llm.answer == stream.label)[last]
    return {
        "name": name,
        "title": title,
        "points": points(stream, played),
        "last_fifth": {
            "items": len(last),
            "llm_share": _mean(played.llm[last]),
            "accuracy": _mean(right),
            "accuracy_alone": _mean((played.alone == stream.label)[last]),
            "above_llm": round(100 * float(against.mean()), 2),
            "above_llm_95": _interval(100 * against, seed),
        },
        "gates": played.gates,
    }


def claims(arms: Mapping[str, Json], stream: Stream, played: Mapping[str, Played]) -> Json:
    """What was aimed at, and what came of it. Points are percentage points of accuracy."""
    found: Json = {}
    for name, bar in (("federated", -0.3), ("federated_corrected", 0.0)):
        last = arms[name]["last_fifth"]
        accurate = last["above_llm"] >= bar if bar else last["above_llm"] > bar
        found[name] = {"holds": bool(accurate and last["llm_share"] <= 0.05), **last}
    for suffix in ("", "_corrected"):
        found[f"items_ratio{suffix}"] = items_ratio(stream, played[f"local{suffix}"], played[f"federated{suffix}"])
    return found


def items_ratio(stream: Stream, local: Played, federated: Played) -> Json:
    """After how many texts per device the devices alone, without asking, are as often right as local adapters are in
    the end: with the fleet's adapters, over with each device's own. Smoothed over two rounds."""
    curves = [
        np.array([_mean((one.alone == stream.label)[rows]) for rows in stream.rounds]) for one in (local, federated)
    ]
    smooth = [np.convolve(curve, (0.5, 0.5), "valid") for curve in curves]
    items = np.cumsum([len(rows) for rows in stream.rounds])[1:] / stream.devices
    bar = float(smooth[0][-1])
    reached = [
        next((float(n) for n, value in zip(items, curve, strict=True) if value >= bar), None) for curve in smooth
    ]
    ratio = None if None in reached else round(reached[1] / reached[0], 3)  # type: ignore[operator]
    return {"accuracy": round(bar, 4), "items_local": reached[0], "items_federated": reached[1], "ratio": ratio}


def titles() -> dict[str, str]:
    return {"slm": "SLM only", "llm": "LLM only", **{one.name: one.title for one in ARMS}}


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4) if len(values) else 0.0


def _interval(values: Any, seed: int) -> list[float]:
    """Of the mean: bootstrap over texts, which are the same in both arms."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(_RESAMPLES)]
    return [round(float(bound), 2) for bound in np.percentile(means, _INTERVAL)]
