"""A process that puts one of two adapters after the other into use and says so. It is meant to be killed.

Arguments: the folder, and how often (default: for ever).
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from agent.adapt.store import AdapterStore
from tests.agent.adapt.adapters import MODEL

folder = Path(sys.argv[1])
store = AdapterStore(folder / "adapters", MODEL)
ids = [store.add(folder / f"adapter-{seed}.gguf", "own").id for seed in (1, 2)]
for turn in range(int(sys.argv[2])) if len(sys.argv) > 2 else count():
    print(store.commit("own", ids[turn % 2], "better"), ids[turn % 2], flush=True)
