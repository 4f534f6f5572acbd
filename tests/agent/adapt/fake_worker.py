"""A worker that only pretends to train: it counts to a number that its job names as memory, one step a hundredth of a
second, and checkpoints each. Arguments: the folder, and what it does: nothing else, or `hang`, `die` (each time, after
two steps) or `fail`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from agent.adapt import job
from agent.adapt.job import Job, Progress, Result, Verdict
from agent.adapt.worker import die_with

die_with(os.getppid())
folder, mode = Path(sys.argv[1]), sys.argv[2]
given = job.read(folder, job.JOB, Job)
assert given is not None
reached = folder / job.CHECKPOINT
begin = int(reached.read_text()) if reached.exists() else 0
for step in range(begin + 1, given.memory + 1):
    time.sleep(0.01)
    reached.write_text(str(step))
    job.write(folder, job.PROGRESS, Progress("train", step, given.memory))
    if mode == "hang":
        time.sleep(3600)
    if mode == "die" and step == begin + 2:
        os.kill(os.getpid(), signal.SIGKILL)
if mode == "fail":
    job.write(folder, job.RESULT, Result(kind="BadAdapter", error="made for another model"))
    sys.exit(9)
job.write(folder, job.RESULT, Result(Verdict(True, f"from {begin}", 0)))
