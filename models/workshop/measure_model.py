"""`python -m models.workshop.measure_model FOLDER`: speed, peak memory and losses of a model, and of nothing else.

FOLDER/asked.json says of which model; what is found is put beside it, in the files named below. Speed and memory are
those of an engine for one request; the passages are read by another one afterwards, whose memory does not count.
"""

from __future__ import annotations

import sys
import time
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from models.engine.open import EngineOptions, open_engine
from models.rss import rss
from models.workshop.perplexity import BESIDE, Reading, read
from models.workshop.speed import CONTEXT, Speed, speed
from protocol.errors import SkerryError

ASKED, MEASURED = "asked.json", "measured.json"
LOSSES, LIKELIEST = "losses.npy", "likeliest.npy"
DISTRIBUTIONS = "distributions"


class Asked(msgspec.Struct, frozen=True):
    """`passages`: token ids; `rounds` of the speed; `keep`: also write what the model says at each token."""

    model: str
    passages: list[list[int]]
    threads: int
    rounds: int
    keep: bool


class Found(msgspec.Struct, frozen=True):
    """`peak`: bytes in memory."""

    speed: Speed
    peak: int


def main(folder: Path) -> None:
    asked = msgspec.json.decode((folder / ASKED).read_bytes(), type=Asked)
    found = _found(asked)
    reading = _reading(asked, folder / DISTRIBUTIONS)
    np.save(folder / LOSSES, reading.losses)
    np.save(folder / LIKELIEST, reading.likeliest)
    (folder / MEASURED).write_bytes(msgspec.json.encode(found))


def _found(asked: Asked) -> Found:
    options = EngineOptions(context=CONTEXT, sequences=1, threads=asked.threads, hidden=False)
    engine = open_engine(Path(asked.model), options)
    try:
        return Found(speed(engine, list(chain(*asked.passages)), time.perf_counter, asked.rounds), rss(peak=True))
    finally:
        engine.close()


def _reading(asked: Asked, path: Path) -> Reading:
    beside = min(BESIDE, len(asked.passages))
    context = beside * max(map(len, asked.passages))
    options = EngineOptions(context=context, sequences=beside, threads=asked.threads, hidden=False)
    engine = open_engine(Path(asked.model), options)
    try:
        if not asked.keep:
            return read(engine, asked.passages, None)
        with path.open("wb") as file:
            return read(engine, asked.passages, file)
    finally:
        engine.close()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (SkerryError, OSError) as error:
        sys.exit(str(error))
