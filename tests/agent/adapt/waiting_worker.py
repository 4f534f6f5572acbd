"""The worker's beginning alone: it binds itself to its parent, steps back, says its process id, and waits."""

from __future__ import annotations

import os
import sys
import time

from agent.adapt import worker

worker.die_with(int(sys.argv[2]))
worker.step_back()
print(os.getpid(), flush=True)
time.sleep(600)
