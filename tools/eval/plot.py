"""The figures of `skerry eval memory` as a picture: quality against calls, and the sweep of thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

Rows = list[dict[str, Any]]

_LINES = {("similarity", False): ":", ("similarity", True): "--", ("score", True): "-"}


def draw(result: dict[str, Rows], path: Path) -> None:
    """One row of panels per small model. Raises ConfigError without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    slms = list(dict.fromkeys(row["slm"] for row in result["learned"]))
    figure, panels = plt.subplots(len(slms), 2, figsize=(11, 4.5 * len(slms)), squeeze=False)
    for (left, right), slm in zip(panels, slms, strict=True):
        _quality(left, [row for row in result["learned"] if row["slm"] == slm and row["order"] == 0])
        _sweep(right, [row for row in result["thresholds"] if row["slm"] == slm and row["kind"] == "all"])
        left.set_title(f"{slm}: quality against calls")
        right.set_title(f"{slm}: sweep of thresholds")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _quality(panel: Any, rows: Rows) -> None:
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        of_kind = [row for row in rows if row["kind"] == kind]
        for calls, quality, line in (("calls_without", "quality_without", ":"), ("calls", "quality", "-")):
            points = [(row[calls], row[quality]) for row in of_kind]
            panel.plot(
                *zip(*points, strict=True), line, marker=".", color=f"C{number}", label=kind if line == "-" else None
            )
    panel.set_xlabel("share of tokens from the LLM (dotted: without memory)")
    panel.set_ylabel("share of tokens that are the LLM's")
    panel.legend(fontsize=8)


def _sweep(panel: Any, rows: Rows) -> None:
    for (by, gate), line in _LINES.items():
        chosen = [row for row in rows if (row["by"], row["gate"]) == (by, gate) and row["right"] is not None]
        label = f"{by}, {'with' if gate else 'without'} gate"
        panel.plot([r["hits"] for r in chosen], [r["right"] for r in chosen], line, marker=".", label=label)
    panel.set_xlabel("hits")
    panel.set_ylabel("share of hits that are right")
    panel.legend(fontsize=8)
