"""How `skerry edge status` shows the rounds of adapters."""

from __future__ import annotations

from typing import Any

from server.edge.adapter_overview import AdapterOverview
from tools.edge_rounds import doing, past, refused, rounds_json

_SHOWN = 10  # history entries, and rounds with their bytes
_KB = 1000


def adapters_json(found: AdapterOverview) -> dict[str, Any]:
    return rounds_json(found) | {
        "trouble": found.trouble,
        "devices": {"known": found.known, "offered": found.offered, "uploaded": found.uploaded},
        "groups": [
            {
                "model": kept.group.model,
                "devices": kept.group.devices,
                "lessons": kept.group.lessons,
                "share": kept.group.share,
                "blobs": {str(rank): {"id": blob.id, "bytes": blob.bytes} for rank, blob in kept.group.blobs.items()},
            }
            for kept in found.groups
        ],
        "traffic": [{"round": round, "up": up, "down": down} for round, (up, down) in found.traffic.items()],
    }


def adapters_text(found: AdapterOverview) -> str:
    lines = [
        f"adapters: round {found.state.round}, {doing(found)}; number {found.state.number}",
        f"devices: {found.known:,} known; of this round {found.offered:,} offered, {found.uploaded:,} uploaded",
    ]
    lines += [f"trouble in the last round: {found.trouble}"] if found.trouble else []
    lines += [f"{'MODEL':14}{'DEVICES':>9}{'LESSONS':>10}  RANKS (kB)"] if found.groups else []
    for kept in found.groups:
        of = kept.group
        ranks = ", ".join(f"{rank} ({blob.bytes / _KB:,.0f})" for rank, blob in sorted(of.blobs.items()))
        lines.append(f"{of.model[:12]:14}{of.devices:>9,}{of.lessons:>10,}  {ranks}")
    lines += refused(found)
    lines += [f"{'ROUND':>8}{'UP kB':>12}{'DOWN kB':>12}"] if found.traffic else []
    for number, (up, down) in list(found.traffic.items())[:_SHOWN]:
        lines.append(f"{number:>8}{up / _KB:>12,.0f}{down / _KB:>12,.0f}")
    return "\n".join(lines + past(found, _SHOWN))
