"""The figures of `skerry eval news` and `text` as tables, and as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from protocol.errors import ConfigError

Json = dict[str, Any]

SHARES = (0.1, 0.25, 0.5, 0.75)  # at which tables show the quality
_DRAWN = {  # arm: line of the plot
    "random": ":",
    "static": "-",
    "local": "--",
    "federated": "-",
    "federated_similar": "-",
    "centralised": "-.",
    "query_router": "--",
    "router_head": "-",
    "peer_memory": "-",
    "per_device": ":",
    "oracle": ":",
    "uhlm_averse": "",
    "uhlm_prone": "",
}
_COLOURS = (
    *("#999", "#000", "#1f77b4", "#ff7f0e", "#d62728", "#8c564b", "#e377c2"),
    *("#2ca02c", "#17becf", "#9467bd", "#555", "#bcbd22", "#7f7f00"),
)
_VERDICTS = {True: "holds", False: "does not hold", None: "cannot be told"}


def tables(result: Json) -> str:
    return "\n".join(line for pair in result["pairs"] for line in _pair(pair))


def _pair(pair: Json) -> Iterator[str]:
    data, arms = pair["data"], pair["arms"]
    yield f"{pair['slm']} with {pair['llm']}"
    yield (
        f"  {data['requests']} requests, {data['steps']} steps; {data['devices']} devices, {data['seeds']} seeds, "
        f"Dirichlet alpha {data['alpha']:g} (label skew {data['skew']:.2f})"
    )
    yield f"  quality of the SLM alone {_with_ci(data['slm_only'])}, of the LLM alone {_with_ci(data['llm_only'])}"
    heads = ["area", "95 %", *(f"at {share:.0%}" for share in SHARES), f">= {data['close_to']:.3f} at", "rounds", "kB"]
    yield _line("arm", heads)
    for arm in arms.values():
        low, high = arm["auc_ci"]
        qualities = [f"{quality_at(arm, data, share):.3f}" for share in SHARES]
        close, rounds = arm["close_share"], arm["rounds_to_converge"]
        kilobytes = np.mean([point["bytes_total"] for point in arm["points"]]) / 1000
        cells = [f"{arm['auc']:.3f}", f"{low:.3f}-{high:.3f}", *qualities]
        cells += ["-" if close is None else f"{close:.1%}", "-" if rounds is None else f"{rounds:.1f}"]
        yield _line(arm["title"] + (" *" if arm["hindsight"] else ""), [*cells, f"{kilobytes:.0f}"])
    yield "  *: in hindsight; at S %: quality at that share of the LLM; kB: of a whole run, mean over settings"
    yield _line("learned, at price 0.3", ["share", "quality", "audits", "stream", "lift", "kB", "B/round"])
    for arm in arms.values():
        for point in arm["points"]:
            if point.get("price") == 0.3 and arm["rounds_to_converge"] is not None:
                shares = [point["llm_share"], point["quality"], point["audits"], point["stream"]["llm_share"]]
                cells = [*(f"{share:.1%}" for share in shares), f"{point['lift']:+.4f}"]
                rounds = point["bytes_per_device_and_round"]
                yield _line(arm["title"], [*cells, f"{point['bytes_total'] / 1000:.0f}", f"{rounds:.0f}"])
    measures = (f"{name} {_with_ci(area)}" for name, area in data["static_auc_by_measure"].items())
    yield "  area of all static thresholds, by measure: " + ", ".join(measures)
    for claim in pair["claims"].values():
        yield f"  {_VERDICTS[claim['holds']]}: {claim['claim']}"
        for name, figure in claim.items():
            if isinstance(figure, dict) and "ci" in figure:
                yield f"    {name.replace('_', ' ')}: {figure['value']:+.4f} ({_ci(figure)})"
    yield ""


def quality_at(arm: Json, data: Json, share: float) -> float:
    """By the lines under which the area is."""
    points = sorted((point["llm_share"], point["quality"]) for point in arm["points"])
    points = [(0.0, data["slm_only"]["value"]), *points, (1.0, data["llm_only"]["value"])]
    return float(np.interp(share, [x for x, _ in points], [y for _, y in points]))


def _line(title: str, cells: list[str]) -> str:
    return f"  {title:<40}" + "".join(f"{cell:>13}" for cell in cells)


def _with_ci(figure: Json) -> str:
    return f"{figure['value']:.3f} ({_ci(figure)})"


def _ci(figure: Json) -> str:
    low, high = figure["ci"]
    return f"{low:.4f} to {high:.4f}"


def draw(result: Json, path: Path) -> None:
    """For each pair, quality against the LLM's share, and regret after each round. Raises ConfigError without
    matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from PIL import Image  # comes with matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    pairs = result["pairs"]
    figure, panels = plt.subplots(len(pairs), 2, figsize=(11, 4 * len(pairs)), squeeze=False)
    for (left, right), pair in zip(panels, pairs, strict=True):
        _qualities(left, pair)
        _regrets(right, pair)
    panels[0][0].legend(fontsize=6)
    panels[0][1].legend(fontsize=7)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    plt.close(figure)
    Image.open(drawn).quantize(64).save(path, format="PNG", optimize=True)  # a third of the size


def _qualities(panel: Any, pair: Json) -> None:
    data = pair["data"]
    ends = ([0.0, 1.0], [data["slm_only"]["value"], data["llm_only"]["value"]])
    panel.plot(*ends, "k^", label="SLM only, LLM only")
    for number, (name, line) in enumerate(_DRAWN.items()):
        arm = pair["arms"].get(name)
        if arm is not None:
            points = sorted((point["llm_share"], point["quality"]) for point in arm["points"])
            style = {"linestyle": line or "none", "marker": "." if line else "x", "color": _COLOURS[number]}
            panel.plot(*zip(*points, strict=True), label=arm["title"], linewidth=1.2, markersize=5, **style)
    panel.set_title(f"{pair['slm']}\nwith {pair['llm']}", fontsize=8)
    panel.set_xlabel("share of the LLM, audits included")
    panel.set_ylabel("quality")


def _regrets(panel: Any, pair: Json) -> None:
    for name, regrets in pair["claims"]["federated_beats_alone"]["regret_by_round"].items():
        panel.plot(range(1, len(regrets) + 1), regrets, marker=".", label=pair["arms"][name]["title"])
    panel.set_xlabel("rounds")
    panel.set_ylabel("regret, mean over prices")
    panel.grid(alpha=0.3)
