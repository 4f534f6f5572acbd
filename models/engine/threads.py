"""How many threads a decode should use: all cores when they are free, fewer when they are not.

ggml's threads spin at a barrier after every operation, so one thread that has to share its core holds up all others:
with every core busy a decode can be forty times slower with two threads than with one. The governor sees this in the
step times and settles on the thread count that is fastest at the moment. A prompt, which is one long pass, can't be
tried out: it gets the cores that nobody else is running on just then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median

_TRIAL = 5  # steps measured at a thread count before it is judged; the first one pays for the change
_SLOWER = 1.3  # a median step this much over the usual one is worth a trial of fewer threads
_BETTER = 0.93  # a trial must beat the present median by this much to be adopted
_HOPELESS = 3.0  # a step on trial this much over the present median ends the trial
_SOON, _LATE = 48, 1024  # steps until the next trial of more threads: doubles while trials fail


def physical_cores() -> int:
    """Cores this process may use, two hardware threads of one core counted once."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return max(1, len(siblings))


def others_running() -> int:
    """Threads that want to run now besides the caller's, on the whole machine; 0 where the system does not tell."""
    try:
        stat = Path("/proc/stat").read_text()
    except OSError:
        return 0
    for line in reversed(stat.splitlines()):
        if line.startswith("procs_running"):
            return max(0, int(line.split()[1]) - 1)
    return 0


class ThreadGovernor:
    """Feed it every single-token step's time, in seconds; `count` is the thread count to use next.

    Hill climbing by trials: a trial runs a few steps at another count and keeps it if it is clearly faster. Fewer
    threads are tried when steps become slower than usual, one more at growing intervals.
    """

    def __init__(self, limit: int, others: Callable[[], int] = others_running) -> None:
        self.limit = limit
        self._others = others
        self._cores = physical_cores()
        self.count = limit
        self._settled = limit
        self._recent: list[float] = []
        self._now = 0.0  # the settled count's latest median step
        self._usual: float | None = None  # the settled count's median step when nothing disturbs it
        self._patience = _SOON
        self._until_trial = _SOON
        self._rejected: float | None = None  # the median at which the last trial of fewer threads failed

    def for_prompt(self) -> int:
        """The thread count for a prompt that is about to be computed. The first one also sets where steps begin."""
        count = max(1, min(self.limit, self._cores - self._others()))
        if self._usual is None and not self._recent:
            self.count = self._settled = count
        return count

    def observe(self, seconds: float) -> int:
        """Notes one step and returns the thread count for the next one."""
        if self.limit == 1:
            return 1
        on_trial = self.count != self._settled
        self._recent.append(seconds)
        if on_trial and seconds > _HOPELESS * self._now:
            self._judge(seconds)
        elif len(self._recent) >= _TRIAL:
            if on_trial:
                self._judge(median(self._recent[1:]))
            else:
                self._steady(median(self._recent))
        else:
            return self.count
        self._recent.clear()
        return self.count

    def _steady(self, now: float) -> None:
        first = self._usual is None
        usual = now if self._usual is None else self._usual
        slow = first or now > _SLOWER * usual
        # The usual time follows noise and the context's growing length; a jump is somebody else's work.
        self._usual = usual * 1.01 if slow and not first else usual + (now - usual) * (0.3 if now < usual else 0.1)
        self._now = now
        self._until_trial -= _TRIAL
        if not slow:
            self._rejected = None
        elif self._rejected is not None and now < _SLOWER * self._rejected:
            slow = False  # fewer threads were tried at this speed already and did not help
        if slow and self._settled > 1:
            self.count = self._settled // 2
        elif self._until_trial <= 0 and self._settled < self.limit:
            self.count = self._settled + 1

    def _judge(self, trial: float) -> None:
        """Keeps the count on trial if it is faster. After fewer threads even fewer are tried, down to one: as long as
        one of them has to share its core, one less is hardly faster."""
        tried, up = self.count, self.count > self._settled
        if trial < _BETTER * self._now:
            self._settled = tried
            self._usual = self._now = trial
            self._rejected = None
            self._patience = _SOON
        elif up:
            self._patience = min(_LATE, self._patience * 2)
        else:
            self._rejected = self._now
        self.count = self._settled if up or tried == 1 else tried // 2
        self._until_trial = self._patience
