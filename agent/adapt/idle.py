"""Whether this is a moment to train: nobody else needs the processor, it is cool, and there is power.

`root` is `/`, or a tree that looks like it. What a system does not tell is taken for fine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_COOLER = 5.0  # degrees by which it has to cool down before training goes on
_SANE = (1.0, 150.0)  # degrees; sensors that are not there report others
_THROTTLED = 0xF  # of the Raspberry Pi's firmware: under-voltage, capped, throttled, soft limit, all at present
_COOLS_CPU = re.compile(r"cpu|processor", re.IGNORECASE)


class Machine:
    """Asked now and then; load is what it was since the last time. `celsius`: no training at or above.
    `busy`: nor while others take more than this share of all cores' time."""

    def __init__(self, root: Path, celsius: float, busy: float = 0.5) -> None:
        self._root = root
        self._celsius = celsius
        self._busy = busy
        self._was_hot = False
        self._times = _times(root)

    def why_not(self) -> str | None:
        """Why this is no moment to train: `hot`, `on battery` or `busy`; None: it is one."""
        others = self._others()
        if self._hot():
            return "hot"
        if _on_battery(self._root):
            return "on battery"
        return "busy" if others > self._busy else None

    def _hot(self) -> bool:
        limit = self._celsius - (_COOLER if self._was_hot else 0.0)
        hottest = max(_temperatures(self._root), default=0.0)
        self._was_hot = hottest >= limit or _throttled(self._root)
        return self._was_hot

    def _others(self) -> float:
        """Share of the processors' time that went to work of normal priority, which training is not."""
        before, self._times = self._times, _times(self._root)
        if before is None or self._times is None:
            return 0.0
        total = self._times[1] - before[1]
        return (self._times[0] - before[0]) / total if total > 0 else 0.0


def _times(root: Path) -> tuple[int, int] | None:
    """Of all processors since the start, in ticks: user and system at normal priority, and everything."""
    fields = _text(root / "proc/stat").partition("\n")[0].split()
    if len(fields) < 8 or fields[0] != "cpu":
        return None
    user, nice, system, idle, iowait, irq, softirq = map(int, fields[1:8])
    work = user + system + irq + softirq
    return work, work + nice + idle + iowait


def _temperatures(root: Path) -> Iterator[float]:
    """Degrees Celsius."""
    for path in (root / "sys/class/thermal").glob("thermal_zone*/temp"):
        text = _text(path).strip()
        if re.fullmatch(r"\d+", text) and _SANE[0] < (degrees := int(text) / 1000) < _SANE[1]:
            yield degrees


def _throttled(root: Path) -> bool:
    firmware = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    if re.fullmatch(r"(0x)?[0-9a-fA-F]+", firmware) and int(firmware, 16) & _THROTTLED:
        return True
    for device in (root / "sys/class/thermal").glob("cooling_device*"):
        if _COOLS_CPU.search(_text(device / "type")) and _text(device / "cur_state").strip() not in ("", "0"):
            return True
    return False


def _on_battery(root: Path) -> bool:
    mains, discharging = [], False
    for supply in (root / "sys/class/power_supply").glob("*"):
        kind = _text(supply / "type").strip()
        if kind == "Mains":
            mains.append(_text(supply / "online").strip() != "0")
        elif kind == "Battery" and _text(supply / "scope").strip() != "Device":  # such as a mouse's
            discharging = discharging or _text(supply / "status").strip() == "Discharging"
    return discharging or (bool(mains) and not any(mains))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
