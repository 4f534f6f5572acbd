"""How much memory a process holds."""

from __future__ import annotations

import contextlib
from pathlib import Path


def rss(process: int | str = "self", *, peak: bool = False) -> int:
    """Bytes in memory now, or at the peak so far; 0 where the system does not say (proc(5), VmRSS and VmHWM).

    Not getrusage's ru_maxrss: a process that was started by a larger one begins with the peak of that one.
    """
    field = "VmHWM:" if peak else "VmRSS:"
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
