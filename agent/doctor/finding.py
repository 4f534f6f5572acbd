"""One thing that a check found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`error`: the agent does not do what is configured until this is put right; `warn`: it does, but worse than it
    could. `remedy`: what to do, "" where nothing has to be done."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


def size(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
