"""`skerry bench adapt`: training, its pause, adapters at work, and the edge's aggregate of a hundred of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from agent.adapt import job
from agent.adapt.job import Job, Progress
from agent.adapt.lesson import Lesson, Target, encode
from agent.adapt.recipe import Recipe
from agent.adapt.supervise import Supervisor
from models.adapter import Adapter, Factors, shapes_of, write
from models.engine.base import Mix
from models.engine.base import Sequence as Place
from models.engine.gguf import GgufEngine, GgufTokenizer
from models.engine.threads import physical_cores
from models.fingerprint import fingerprint
from models.gguf_header import read_header
from protocol.errors import SkerryError
from tools.bench.aggregate import RANKS

_RANK = 8
_QUESTION = "What does the following message to the harbour office ask for? The boat {} needs a berth until evening."
_CHUNK = 16  # tokens that an arm decodes before the other's turn
_PAUSES = 7
_LOOK_S = 0.0005
_PATIENCE_S = 300.0

Say = Callable[[str], None]


def measure(model: Path, *, lessons: int, adapters: int, rounds: int, progress: Say) -> dict[str, Any]:
    """The object of `skerry bench adapt --json`; MB are 10^6 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="skerry-bench-"))
    try:
        trained = _training(model, folder / "work", lessons, progress)
        working = _at_work(model, folder, rounds, progress)
        return trained | working | _aggregate(model, folder / "fleet", adapters, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _training(model: Path, folder: Path, count: int, progress: Say) -> dict[str, Any]:
    """A real one, paused some times in between."""
    given = Job(str(model), Recipe(rank=_RANK, epochs=1.0), rank=_RANK, threads=physical_cores())
    job.prepare(folder, given, encode(_lessons(GgufTokenizer.open(model), count)))
    stepping = threading.Event()

    def tell(told: Progress) -> None:
        progress(f"{told.stage} {told.done} of {told.total}")
        if told.stage == "train" and told.done:
            stepping.set()

    supervisor = Supervisor(tell)
    pauses: list[float] = []
    pausing = threading.Thread(target=lambda: pauses.extend(_pauses(supervisor, stepping)), daemon=True)
    pausing.start()
    try:
        result = supervisor.run(folder)
    finally:
        supervisor.close()
    pausing.join()
    trained = result.trained
    assert trained is not None
    assert result.verdict is not None
    return {
        "examples_per_s": round(trained.examples_per_s, 3),
        "rss_mb": round(trained.rss / 1e6, 1),
        "rss_predicted_mb": round(trained.predicted / 1e6, 1),
        "pause_s": round(median(pauses), 4) if pauses else None,
        "pause_slowest_s": round(max(pauses), 4) if pauses else None,
        "train_s": round(trained.seconds, 1),
        "lessons": trained.lessons,
        "gate": result.verdict.reason,
    }


def _lessons(tokenizer: GgufTokenizer, count: int) -> list[Lesson]:
    made = []
    for number in range(count):
        prompt = tokenizer.encode(_QUESTION.format(number), start=True)
        answer = tokenizer.encode(" a berth")
        targets = [Target(len(prompt) + at, "label", [token]) for at, token in enumerate(answer)]
        made.append(Lesson(prompt + answer, targets, "example"))
    return made


def _pauses(supervisor: Supervisor, stepping: threading.Event) -> list[float]:
    """Seconds from a request to a worker that stands still, as the system says."""
    found: list[float] = []
    if not stepping.wait(_PATIENCE_S):
        return found
    for _ in range(_PAUSES):
        pid = supervisor.pid
        began = time.perf_counter()
        supervisor.pause()
        while pid is not None and (state := _state(pid)) not in ("T", ""):
            time.sleep(_LOOK_S)
        if pid is None or state == "":
            break
        found.append(time.perf_counter() - began)
        supervisor.resume()
        time.sleep(0.2)  # it has to run again before it can be stopped
    supervisor.resume()
    return found


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _at_work(model: Path, folder: Path, rounds: int, progress: Say) -> dict[str, Any]:
    """An adapter attached, and decoding with and without it in turns."""
    write(_random(model, _RANK, 0), path := folder / "adapter.gguf")
    engine = GgufEngine(model, context=4096, sequences=2)
    try:
        attached = []
        for _ in range(5):
            began = time.perf_counter()
            id = engine.attach(path)
            attached.append(time.perf_counter() - began)
            engine.detach(id)
        engine.attach(path)
        rates = _decode(engine, [(), ((id, 1.0),)], rounds, progress)
    finally:
        engine.close()
    return {
        "attach_ms": round(1000 * median(attached), 2),
        "decode_ratio": round(median(one / bare for bare, one in zip(*rates, strict=True)), 3),
        "decode_tok_s": round(median(rates[0]), 1),
        "decode_adapter_tok_s": round(median(rates[1]), 1),
    }


def _decode(engine: GgufEngine, mixes: Sequence[Mix], rounds: int, progress: Say) -> list[list[float]]:
    """Tokens per second by mix and round. The turns alternate in order, so that drift hits both alike."""
    prompt = engine.tokenizer.encode(_QUESTION.format(1), start=True)
    places = [engine.open(prompt, (rounds + 1) * (_CHUNK + 1), mix) for mix in mixes]
    for place in places:
        engine.forward([(place, place.align(prompt))])
    rates: list[list[float]] = [[] for _ in mixes]
    for turn in range(rounds + 1):
        order = range(len(places)) if turn % 2 else reversed(range(len(places)))
        for arm in order:
            rate = _rate(engine, places[arm])
            if turn:  # the first warms up
                rates[arm].append(rate)
        if turn:
            progress(f"round {turn}/{rounds}: bare {rates[0][-1]:.1f}, with adapter {rates[1][-1]:.1f} tok/s")
    return rates


def _rate(engine: GgufEngine, place: Place) -> float:
    token = 1 + len(place.tokens) % 1000
    engine.forward([(place, [token])])  # whatever the change of the mix costs
    began = time.perf_counter()
    for _ in range(_CHUNK):
        engine.forward([(place, [token])])
    return _CHUNK / (time.perf_counter() - began)


def _random(model: Path, rank: int, seed: int) -> Adapter:
    """As large as a trained one, in every layer's attn_q and attn_v."""
    random = np.random.default_rng(seed)
    factors = {
        name: Factors(
            random.standard_normal((rank, width), np.float32) * np.float32(0.02),
            random.standard_normal((height, rank), np.float32) * np.float32(0.02),
        )
        for name, (height, width) in shapes_of(model).items()
        if name.endswith((".attn_q", ".attn_v"))
    }
    return Adapter(fingerprint(model), read_header(model).architecture, 2.0 * rank, factors)


def _aggregate(model: Path, folder: Path, count: int, progress: Say) -> dict[str, Any]:
    """In a process of its own, as the edge does it."""
    folder.mkdir()
    for number in range(count):
        write(_random(model, RANKS[number % len(RANKS)], number), folder / f"device-{number}.gguf")
        progress(f"adapter {number + 1} of {count} made")
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.aggregate", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SkerryError(f"the aggregate failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
