"""The figures of `skerry eval flywheel` as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

Json = dict[str, Any]

_LINES = {
    "slm": ("#999", ":"),
    "llm": ("#000", ":"),
    "thresholds": ("#1f77b4", "-"),
    "memory": ("#17becf", "-"),
    "local": ("#ff7f0e", "-"),
    "federated": ("#d62728", "-"),
    "local_corrected": ("#ff7f0e", "--"),
    "federated_corrected": ("#d62728", "--"),
}
_PANELS = (
    ("llm_share", "share of texts sent to the LLM", False),
    ("accuracy", "accuracy of the answers", False),
    ("accuracy_alone", "accuracy of the device by itself", False),
    ("bytes_total", "bytes so far, everything counted", True),
)


def table(result: Json) -> str:
    return "\n".join(_lines(result))


def _lines(result: Json) -> Iterator[str]:
    yield (
        f"{result['items']} texts, {result['devices']} devices with {result['slm']}, LLM {result['llm']}; "
        f"over the last fifth ({result['arms'][0]['last_fifth']['items']} texts):"
    )
    heads = ("LLM share", "accuracy", "alone", "above LLM, points (95 %)", "kB in all")
    yield f"{'arm':<34}" + "".join(f"{head:>12}" if len(head) < 12 else f"{head:>27}" for head in heads)
    for arm in result["arms"]:
        last = arm["last_fifth"]
        low, high = last["above_llm_95"]
        above = f"{last['above_llm']:+.1f} ({low:+.1f} to {high:+.1f})"
        shares = "".join(f"{last[key]:>12.1%}" for key in ("llm_share", "accuracy", "accuracy_alone"))
        yield f"{arm['title']:<34}{shares}{above:>27}{arm['points'][-1]['bytes_total'] / 1000:>12.0f}"
    for name, claim in result["claims"].items():
        if name.startswith("items_ratio"):
            taught = "users correct" if name.endswith("corrected") else "the LLM alone"
            reached = f"own adapters {claim['items_local']}, the fleet's {claim['items_federated']}"
            yield f"texts per device until {claim['accuracy']:.1%} alone ({taught}): {reached}, ratio {claim['ratio']}"
        else:
            yield f"{name}: {'holds' if claim['holds'] else 'does not hold'}"


def draw(result: Json, path: Path) -> None:
    """Raises ConfigError without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    figure, panels = plt.subplots(2, 2, figsize=(12, 8))
    for panel, (key, label, logarithmic) in zip(panels.flat, _PANELS, strict=True):
        for arm in result["arms"]:
            colour, line = _LINES[arm["name"]]
            items = [point["items"] for point in arm["points"]]
            values = [point[key] for point in arm["points"]]
            panel.plot(items, values, line, color=colour, marker=".", label=arm["title"])
        panel.set_xlabel("texts seen by the fleet")
        panel.set_ylabel(label)
        if logarithmic:
            panel.set_yscale("symlog", linthresh=1000)
    panels.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
