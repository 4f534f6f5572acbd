"""Screens and aggregates the adapters of a folder, and says what it took: `python -m tools.bench.aggregate FOLDER`."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

from models.adapter import read, write
from models.rss import rss
from server.edge.adapters import Contribution, aggregate, screen

RANKS = (8, 12, 16, 24, 32)


def main() -> None:
    folder = Path(sys.argv[1])
    given = [Contribution(path.stem, 1.0, partial(read, path)) for path in sorted(folder.glob("*.gguf"))]
    first = given[0].load()
    began = time.monotonic()
    kept, refused = screen(given, first.model, first.architecture, "flexlora")
    made = aggregate(kept, "flexlora", RANKS, first.alpha)
    for rank, adapter in made.items():
        write(adapter, folder / f"of-rank-{rank}.gguf")
    found = {
        "aggregate_s": round(time.monotonic() - began, 2),
        "aggregate_rss_mb": round(rss(peak=True) / 1e6, 1),
        "aggregated": len(kept),
        "aggregate_refused": len(refused),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
