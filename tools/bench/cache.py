"""`skerry bench cache`: the device's memory at full size: speed, recall, disk and RAM."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.memory.memory import EntryMemory
from protocol.memory import Entry

_CLUSTERS = 4000
_SPREAD = 0.6  # of a cluster, relative to how far clusters are apart
_NEAR = (0.9, 0.99)  # cosines of the queries that have a neighbour
_K = 8
_BATCH = 500  # entries per `add`
_MORE = 3000  # entries that are added while it is asked
_SPACE, _ORIGIN = bytes(16), bytes(range(32))

Keys = NDArray[np.int8]
Vectors = NDArray[np.float32]


def measure(entries: int, *, width: int, queries: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The object of `skerry bench cache --json`. MB are 10^6 bytes.

    Keys are drawn like the hidden states of a language model: 4,000 clusters (one per next token, say) whose sizes fall
    as 1/rank, and directions whose variance falls as 1/rank. Half of the queries are stored keys with noise in all
    directions, at a cosine between 0.9 and 0.99; `recall_at_1` is theirs. The others are new draws, which have no near
    neighbour. Tails are random, so that only the vectors find anything. One process fills the memory, another one opens
    it and asks; `rss_growth_mb` is the latter's, from before it opens the memory, without mapped files.
    """
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        progress(f"drawing {entries} keys of {width} dimensions, and finding their true neighbours")
        keys, asked = _draw(entries + _MORE, width, queries)
        np.save(folder / "keys.npy", keys[:entries])
        np.save(folder / "more.npy", keys[entries:])
        np.save(folder / "queries.npy", asked)
        np.save(folder / "best.npy", _best(keys[:entries], asked))
        del keys
        progress("filling the memory")
        filled = _run("fill", folder)
        progress("asking it")
        return _run("ask", folder) | filled | {"entries": entries, "width": width, "queries": queries}


def _run(part: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench.cache", part, str(folder)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def _draw(entries: int, width: int, queries: int) -> tuple[Keys, Keys]:
    """(entries, width) and (queries, width); the first half of the queries is near a stored key."""
    random = np.random.default_rng(3)
    scales = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    turn = np.linalg.qr(random.standard_normal((width, width)))[0].astype(np.float32)
    centres = random.standard_normal((_CLUSTERS, width), np.float32)
    sizes = 1 / np.arange(1, _CLUSTERS + 1)

    def draw(count: int) -> Vectors:
        chosen = random.choice(_CLUSTERS, count, p=sizes / sizes.sum())
        drawn = centres[chosen] + _SPREAD * random.standard_normal((count, width), np.float32)
        return _unit((drawn * scales) @ turn)

    keys = draw(entries)
    stored = keys[random.choice(entries, queries // 2)]
    noise = random.standard_normal(stored.shape, np.float32)
    noise = _unit(noise - np.sum(noise * stored, axis=1, keepdims=True) * stored)
    cosine = random.uniform(*_NEAR, (len(stored), 1)).astype(np.float32)
    near = cosine * stored + np.sqrt(1 - cosine**2) * noise
    return _int8(keys), _int8(np.concatenate([near, draw(queries - len(near))]))


def _unit(vectors: Vectors) -> Vectors:
    scaled: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def _int8(vectors: Vectors) -> Keys:
    rounded: Keys = np.round(vectors * (127 / np.abs(vectors).max(axis=1, keepdims=True))).astype(np.int8)
    return rounded


def _best(keys: Keys, queries: Keys) -> Vectors:
    """(n,) the highest cosine that each query has with any key."""
    asked, best = _unit(queries.astype(np.float32)), np.full(len(queries), -1, np.float32)
    for start in range(0, len(keys), 10_000):
        part = _unit(keys[start : start + 10_000].astype(np.float32))
        best = np.maximum(best, (asked @ part.T).max(axis=1))
    return best


def _anonymous_mb() -> float:
    """Resident memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def _fill(folder: Path) -> dict[str, Any]:
    keys: Keys = np.load(folder / "keys.npy", mmap_mode="r")
    before = _anonymous_mb()
    with EntryMemory(folder / "memory") as memory:
        began = time.perf_counter()
        _add(memory, keys, 0)
        filled = time.perf_counter() - began
        memory.settle()
        settled = time.perf_counter() - began
        grown = _anonymous_mb() - before
    return {
        "insert_per_s": round(len(keys) / filled),
        "settled_s": round(settled, 1),
        "rss_growth_filling_mb": round(grown, 1),
    }


def _ask_all(folder: Path) -> dict[str, Any]:
    queries: Keys = np.load(folder / "queries.npy")
    best: Vectors = np.load(folder / "best.npy")
    more: Keys = np.load(folder / "more.npy", mmap_mode="r")
    before = _anonymous_mb()
    began = time.perf_counter()
    with EntryMemory(folder / "memory") as memory:
        opened = time.perf_counter() - began
        memory.settle()
        _ask(memory, queries[:200])
        times, similar = _ask(memory, queries)
        grown = _anonymous_mb() - before
        disk = memory.stats().disk_bytes
        segments = [path.stat().st_size for path in (folder / "memory").glob("segment-*")]
        busy = _ask_while_adding(memory, queries, more)
    right = similar >= best - 1e-5
    near = len(queries) // 2
    return {
        "p50_ms": _ms(times, 50),
        "p99_ms": _ms(times, 99),
        "busy_p50_ms": _ms(busy, 50),
        "busy_p99_ms": _ms(busy, 99),
        "recall_at_1": round(float(right[:near].mean()), 4),
        "recall_at_1_far": round(float(right[near:].mean()), 4),
        "disk_mb": round(disk / 1e6, 1),
        "mapped_mb": round(sum(segments) / 1e6, 1),
        "rss_growth_mb": round(grown, 1),
        "open_s": round(opened, 2),
        "segments": len(segments),
    }


def _add(memory: EntryMemory, keys: Keys, first: int) -> None:
    for start in range(0, len(keys), _BATCH):
        memory.add([_entry(first + start + n, key) for n, key in enumerate(keys[start : start + _BATCH])])


def _entry(number: int, key: Keys) -> Entry:
    tail = np.random.default_rng(number).bytes(8)
    return Entry(_SPACE, key.tobytes(), tail, number, 0.9, 1, 1_700_000_000, _ORIGIN, bytes(64))


def _ask(memory: EntryMemory, queries: Keys) -> tuple[list[float], Vectors]:
    """Seconds per lookup, and the similarity of the first neighbour that each found."""
    times, similar = [], []
    for query in queries:
        began = time.perf_counter()
        found = memory.neighbours(_SPACE, query, b"\xff" * 8, _K)
        times.append(time.perf_counter() - began)
        similar.append(found[0].similarity)
    return times, np.array(similar, np.float32)


def _ask_while_adding(memory: EntryMemory, queries: Keys, more: Keys) -> list[float]:
    """Seconds per lookup while entries are added and merged."""

    def work() -> None:
        _add(memory, more, 1 << 30)
        memory.settle()

    thread = threading.Thread(target=work)
    times: list[float] = []
    thread.start()
    while thread.is_alive():
        times += _ask(memory, queries[:20])[0]
    return times


def _ms(seconds: list[float], percentile: float) -> float:
    return round(float(np.percentile(seconds, percentile)) * 1000, 3)


if __name__ == "__main__":
    print(json.dumps({"fill": _fill, "ask": _ask_all}[sys.argv[1]](Path(sys.argv[2]))))
