"""What a memory says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from agent.memory.memory_state import Counts


@dataclass(frozen=True, slots=True)
class SpaceStats:
    """`unindexed`: entries that lie in no segment yet and are compared one by one."""

    space: bytes
    width: int
    entries: int
    segments: int
    unindexed: int


@dataclass(frozen=True, slots=True)
class OriginStats:
    """`dropped`: entries that went when it was quarantined."""

    origin: bytes
    entries: int
    audits: float
    wrong: float
    quarantined: bool
    dropped: int


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """`age_s`: the memory's own clock. `counts`: since it was opened."""

    entries: int
    spaces: list[SpaceStats]
    origins: int
    quarantined: int
    pending: int
    disk_bytes: int
    max_bytes: int
    age_s: float
    write_errors: int
    counts: Counts
