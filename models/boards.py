"""The boards that Skerry is meant for, and what this machine is.

What the table says of a board's speed is an ESTIMATE. It is derived from decode rates that others published for
llama.cpp, as bytes (or weights) of the model times tokens per second:

- Pi 4: Qwen 1.8B Q4_0 3.1 tok/s, Gemma 2B Q4_0 1.8, TinyLlama 1.1B Q8_0 3, f16 2: 3.1 to 4.4 GB/s, about 5e9 weights/s.
- Pi 5: TinyLlama 1.1B Q8_0 9 tok/s, f16 5, Llama 3.2 3B Q4_K_M 5.6: 10.5 to 11.2 GB/s, at least 18e9 weights/s.
- Jetson Orin Nano 8 GB: 68 GB/s nominal (34 with 4 GB), of which its processors are taken to reach half; their
  weights/s are the Pi 5's by cores and clock. Its GPU is not counted.
- x86: a PC of four cores with AVX2 and two channels of DDR4-3200, 51 GB/s nominal, a little over half of it reached.

(https://github.com/aidatatools/ollama-benchmark/pull/9, https://justine.lol/matmul, geerlingguy/ai-benchmarks#24)
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SYSTEM_MB = 1_000  # of a board's memory, what a system without a desktop takes
_SWEPT = 128 << 20  # bytes, more than any cache of these boards
_SWEEPS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """What decoding is bounded by: `bytes_s` read from memory, `weights_s` multiplied, per second."""

    bytes_s: float
    weights_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Board:
    """A known device. `slower`: its float32 training step as a multiple of that of two cores of a 2023 x86-64 server.
    `speed`: an estimate (above), as is `slower`, from cores, clock and vector width. `repack`: it has the dot product
    instructions that rearranged weights are for."""

    memory_mb: int
    cores: int
    slower: float
    speed: Speed
    repack: bool = False
    bfloat16: bool = False

    @property
    def free_mb(self) -> int:
        """Memory that the system leaves."""
        return self.memory_mb - _SYSTEM_MB


BOARDS = {
    # 4 x Cortex-A72, 1.5 GHz
    "pi4": Board(memory_mb=4_000, cores=4, slower=6.0, speed=Speed(3.5e9, 5e9)),
    # 4 x Cortex-A76, 2.4 GHz
    "pi5": Board(memory_mb=8_000, cores=4, slower=1.7, speed=Speed(10.5e9, 20e9), repack=True),
    # 6 x Cortex-A78AE, 1.5 GHz
    "jetson-orin-nano": Board(memory_mb=8_000, cores=6, slower=1.7, speed=Speed(34e9, 19e9), repack=True),
    "x86": Board(memory_mb=8_000, cores=4, slower=1.0, speed=Speed(28e9, 60e9)),
}


def processor() -> str:
    """The processor's name, as the system has it."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def repacks() -> bool:
    """Whether this machine is an Arm with the dot product instructions."""
    return any(line.startswith("Features") and "asimddp" in line.split() for line in _cpuinfo())


def memory_speed(clock: Callable[[], float], threads: int) -> Speed:
    """How fast this machine reads memory, by the best of a few sweeps. `clock` in seconds. It is what decoding can't
    exceed: the arithmetic may take longer."""
    parts = np.array_split(np.ones(_SWEPT // 8, dtype=np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_SWEEPS):
            began = clock()
            list(pool.map(np.sum, parts))
            best = min(best, clock() - began)
    return Speed(_SWEPT / max(best, 1e-9))


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []
