"""What `skerry edge status` shows of rounds of any kind: those of thresholds, and those of adapters."""

from __future__ import annotations

import math
from typing import Any

from server.edge.overview import Rounds


def rounds_json(found: Rounds) -> dict[str, Any]:
    state = found.state
    return {
        "number": state.number,
        "round": state.round,
        "collecting": bool(state.collecting),
        "left_s": round(found.left, 1),
        "next_s": None if math.isinf(found.next) else round(found.next, 1),
        "held": bool(state.held),
        "refusals": found.reasons(),
        "refused": found.refusals,
        "history": [entry._asdict() for entry in found.history],
        "orders": [waiting.kind for waiting in found.orders],
    }


def doing(found: Rounds) -> str:
    if found.state.collecting:
        return f"collecting, {found.left:,.0f} s left"
    return "held" if found.state.held else f"the next in {found.next:,.0f} s"


def refused(found: Rounds) -> list[str]:
    """A line at most."""
    told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.reasons().items()))
    return [f"refused: {told}"] if told else []


def past(found: Rounds, most: int) -> list[str]:
    """Lines of the last `most` numbers, and of what is to be done."""
    lines = [f"{'NUMBER':>8}{'ROUND':>8}{'DEVICES':>9}  WHY"] if found.history else []
    for entry in found.history[:most]:
        why = entry.why if entry.of == entry.number else f"{entry.why}, was {entry.of}"
        lines.append(f"{entry.number:>8}{entry.round:>8}{entry.devices:>9,}  {why}")
    lines += [f"waiting to be done: {', '.join(waiting.kind for waiting in found.orders)}"] if found.orders else []
    return lines
