"""`skerry bench engines`: one model in both formats and several widths, and what our engine adds to onnxruntime.

The files are made from one GGUF file by the workshop, and kept in the cache folder. Every model is measured in a
process of its own; they take turns, in an order that rotates, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime

from models.engine.base import Floats
from models.engine.onnx import OnnxEngine, session_options
from models.engine.threads import physical_cores
from models.fingerprint import fingerprint
from models.model_folder import Decoder, check_folder
from models.workshop import manifest
from models.workshop.child import Say
from models.workshop.export import Exporter, export
from models.workshop.job import Job
from models.workshop.measure import Measured, measure
from models.workshop.quantize import quantize
from tools.eval.data import articles

_PASSAGES = 8
_WARM, _BLOCK = 8, 24  # steps before the clock runs, and of one turn
_START = 64  # tokens in the cache before the steps
_CELLS = 1024
# What is measured beside the GGUF file itself: name, what it is made from, and how.
_RECIPES = {
    "gguf q8_0": ("gguf", "q8_0"),
    "onnx fp32": ("onnx", "genai"),
    "onnx int8": ("onnx fp32", "int8"),
    "onnx mixed": ("onnx fp32", "mixed"),
    "onnx int4": ("onnx fp32", "int4"),
    "onnx int8-dynamic": ("onnx fp32", "int8-dynamic"),
    "onnx fp32, optimum": ("onnx", "optimum"),
    "onnx int8, optimum": ("onnx fp32, optimum", "int8"),
}


def measure_all(
    model: Path, *, cache: Path, env: Mapping[str, str], tokens: int, rounds: int, threads: int, progress: Say
) -> dict[str, Any]:
    """The object of `skerry bench engines --json`; MB are 10^6 bytes. Raises what the workshop raises."""
    files = _files(model, cache / "engines", Job(env, progress))
    passages = [article.text for article in articles(cache, 0)[:_PASSAGES]]
    taken: dict[str, list[Measured]] = {name: [] for name in files}
    for turn in range(rounds):
        names = list(files)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            progress(f"round {turn + 1}/{rounds}: {name}")
            taken[name].append(
                measure(files[name], passages, tokens=tokens, threads=threads, env=env, say=lambda line: None)
            )
    engines = {name: _row(found) for name, found in taken.items()}
    best = max((name for name in engines if _is_quantised_onnx(name)), key=lambda name: engines[name]["decode_tok_s"])
    gguf = [name for name in engines if name.startswith("gguf")]
    ratios = [
        one.decode_tok_s / max(taken[name][turn].decode_tok_s for name in gguf) for turn, one in enumerate(taken[best])
    ]
    exported = manifest.read(files["onnx fp32"])
    return {
        "onnx_best": best,
        "onnx_best_over_gguf": round(median(ratios), 3),
        "engine_overhead": round(_overhead(files["onnx int4"], threads or physical_cores(), 3 * rounds, progress), 4),
        "pytorch_logits_relative_error": exported.checks["logits_relative_error"] if exported else None,
        "threads": threads or physical_cores(),
        "rounds": rounds,
        "engines": engines,
    }


def _is_quantised_onnx(name: str) -> bool:
    return name.startswith("onnx") and "fp32" not in name


def _row(rounds: list[Measured]) -> dict[str, Any]:
    def middle(value: Callable[[Measured], float]) -> float:
        return median(map(value, rounds))

    return {
        "decode_tok_s": round(middle(lambda one: one.decode_tok_s), 1),
        "prefill_tok_s": round(middle(lambda one: one.prefill_tok_s), 1),
        "first_token_ms": round(middle(lambda one: one.first_token_ms), 1),
        "rss_mb": round(middle(lambda one: one.rss_mb), 1),
        "perplexity": round(rounds[0].perplexity, 2),
        "mb": round(rounds[0].bytes / 1e6, 1),
    }


def _files(model: Path, folder: Path, job: Job) -> dict[str, Path]:
    """All forms of the model, made where they are not there yet."""
    files = {"gguf": model}
    folder.mkdir(parents=True, exist_ok=True)
    source = fingerprint(model)
    for name, (origin, how) in _RECIPES.items():
        key = hashlib.sha256(f"{source} {name} {origin} {how}".encode()).hexdigest()[:16]
        target = folder / (f"{key}.gguf" if name.startswith("gguf") else key)
        if not target.exists():
            job.say(f"making {name}")
            _make(files.get(origin, model), target, how, job)
        files[name] = target
    return files


def _make(source: Path, target: Path, how: str, job: Job) -> None:
    exporters: dict[str, Exporter] = {"genai": "genai", "optimum": "optimum"}
    if how in exporters:
        export(source, target, exporters[how], job)
    else:
        quantize(source, target, how, job)


def _overhead(path: Path, threads: int, turns: int, progress: Say) -> float:
    """What a step of the engine takes beyond a bare `session.run_with_iobinding` on bound buffers, as a part of it."""
    progress("the engine against onnxruntime alone")
    engine = OnnxEngine(path, context=_CELLS, sequences=1, threads=threads)
    prompt = list(range(1000, 1000 + _START))
    place = engine.open(prompt, _WARM + _BLOCK)
    bare = _Bare(path, threads)
    ours, alone = [], []
    for _ in range(turns):
        place.rewind(0)
        engine.forward([(place, prompt)])
        ours.append(_seconds(lambda: engine.forward([(place, [1000])])))
        bare.fill(prompt)
        alone.append(_seconds(bare.step))
    place.close()
    engine.close()
    return median(a / b for a, b in zip(ours, alone, strict=True)) - 1


def _seconds(step: Callable[[], object]) -> float:
    for _ in range(_WARM):
        step()
    began = time.perf_counter()
    for _ in range(_BLOCK):
        step()
    return time.perf_counter() - began


class _Bare:
    """A graph with a shared cache, everything bound once; only what changes with a step is bound again."""

    def __init__(self, path: Path, threads: int) -> None:
        decoder = check_folder(path)
        self._session = onnxruntime.InferenceSession(
            path / "model.onnx", session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        self._ids, self._mask = np.zeros((1, _CELLS), np.int64), np.ones((1, _CELLS), np.int64)
        self._kept: list[Floats] = []  # arrays that the session was bound to
        self._length = 0
        self._bind_cache(decoder)
        self._out("logits", (1, 1, decoder.vocab))
        self._states = self._out("hidden_states", (1, _CELLS, decoder.width or 0))

    def _bind_cache(self, decoder: Decoder) -> None:
        shape = (1, decoder.kv_heads, _CELLS, decoder.head_size)
        for layer in range(decoder.layers):
            for kind in ("key", "value"):
                cells = self._out(f"present.{layer}.{kind}", shape)
                name = f"past_key_values.{layer}.{kind}"
                self._binding.bind_input(name, "cpu", 0, np.float32, shape, cells.ctypes.data)

    def _out(self, name: str, shape: tuple[int, ...]) -> Floats:
        values = np.zeros(shape, np.float32)
        self._kept.append(values)
        self._binding.bind_output(name, "cpu", 0, np.float32, shape, values.ctypes.data)
        return values

    def fill(self, prompt: list[int]) -> None:
        self._length = 0
        self._ids[0, : len(prompt)] = prompt
        self._run(len(prompt))

    def step(self) -> None:
        self._run(1)

    def _run(self, new: int) -> None:
        self._length += new
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, (1, new), self._ids.ctypes.data)
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, self._length), self._mask.ctypes.data)
        shape = (1, new, self._states.shape[2])
        self._binding.bind_output("hidden_states", "cpu", 0, np.float32, shape, self._states.ctypes.data)
        self._session.run_with_iobinding(self._binding)
