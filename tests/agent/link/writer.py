"""A process that puts into an outbox, with nobody to send to, and says what is on the disk. It is meant to be killed.

Arguments: the file, and the number to begin with. Prints, after each flush, the last number that was put before it.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from agent.link.outbox import Outbox
from protocol.transport.bus import Bus, BusTransport

outbox = Outbox(Path(sys.argv[1]), BusTransport(Bus(), "never started"))
for number in count(int(sys.argv[2])):
    outbox.put("t", b"%d" % number)
    if number % 7 == 0 and outbox.flush_to_disk():
        print(number, flush=True)
