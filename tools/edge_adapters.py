"""How `skerry edge status` shows the rounds of adapters."""

from __future__ import annotations

import math
from typing import Any

from server.edge.adapter_overview import AdapterOverview

_SHOWN = 10  # history entries, and rounds with their bytes
_KB = 1000


def adapters_json(found: AdapterOverview) -> dict[str, Any]:
    state = found.state
    return {
        "number": state.number,
        "round": state.round,
        "collecting": bool(state.collecting),
        "left_s": round(found.left, 1),
        "next_s": None if math.isinf(found.next) else round(found.next, 1),
        "held": bool(state.held),
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
        "refusals": found.reasons(),
        "refused": found.refusals,
        "traffic": [{"round": round, "up": up, "down": down} for round, (up, down) in found.traffic.items()],
        "history": [entry._asdict() for entry in found.history],
        "orders": [waiting.kind for waiting in found.orders],
    }


def adapters_text(found: AdapterOverview) -> str:
    state = found.state
    doing = "held" if state.held else f"the next in {found.next:,.0f} s"
    doing = f"collecting, {found.left:,.0f} s left" if state.collecting else doing
    lines = [
        f"adapters: round {state.round}, {doing}; number {state.number}",
        f"devices: {found.known:,} known; of this round {found.offered:,} offered, {found.uploaded:,} uploaded",
    ]
    lines += [f"trouble in the last round: {found.trouble}"] if found.trouble else []
    lines += [f"{'MODEL':14}{'DEVICES':>9}{'LESSONS':>10}  RANKS (kB)"] if found.groups else []
    for kept in found.groups:
        of = kept.group
        ranks = ", ".join(f"{rank} ({blob.bytes / _KB:,.0f})" for rank, blob in sorted(of.blobs.items()))
        lines.append(f"{of.model[:12]:14}{of.devices:>9,}{of.lessons:>10,}  {ranks}")
    if reasons := found.reasons():
        lines.append("refused: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items())))
    lines += [f"{'ROUND':>8}{'UP kB':>12}{'DOWN kB':>12}"] if found.traffic else []
    for number, (up, down) in list(found.traffic.items())[:_SHOWN]:
        lines.append(f"{number:>8}{up / _KB:>12,.0f}{down / _KB:>12,.0f}")
    lines += [f"{'NUMBER':>8}{'ROUND':>8}{'DEVICES':>9}  WHY"] if found.history else []
    for entry in found.history[:_SHOWN]:
        why = entry.why if entry.of == entry.number else f"{entry.why}, was {entry.of}"
        lines.append(f"{entry.number:>8}{entry.round:>8}{entry.devices:>9,}  {why}")
    lines += [f"waiting to be done: {', '.join(waiting.kind for waiting in found.orders)}"] if found.orders else []
    return "\n".join(lines)
