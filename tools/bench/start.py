"""`skerry bench start`: from process start to the first token, and the memory of an agent that has answered."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from models.rss import rss
from tools.processes import Child

_QUESTION = "Why is the sky blue?"


def measure(model: Path, *, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The object of `skerry bench start --json`: seconds and MB (10^6 bytes). The model is in the page cache."""
    model.read_bytes()
    seconds = []
    for turn in range(rounds):
        seconds.append(_first_token(model))
        progress(f"round {turn + 1}/{rounds}: first token after {seconds[-1]:.2f} s")
    rss, peak = _memory(model)
    size = model.stat().st_size / 1e6
    return {
        "first_token_s": round(median(seconds), 3),
        "first_token_slowest_s": round(max(seconds), 3),
        "agent_rss_mb": round(rss, 1),
        "agent_peak_rss_mb": round(peak, 1),
        "model_mb": round(size, 1),
        "rss_beyond_model_mb": round(rss - size, 1),
        "rounds": rounds,
    }


def _first_token(model: Path) -> float:
    """`skerry ask` as a user starts it, until its first byte of answer."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tools.cli", "ask", _QUESTION, "--offline", "--model", str(model)]
    with subprocess.Popen([*command, "--max-tokens", "2"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.communicate()
    return seconds


def _memory(model: Path) -> tuple[float, float]:
    """Resident and peak memory of `skerry agent` after an answer of 200 tokens, in MB."""
    with Child(["agent", "--model", str(model), "--port", "0"]) as agent:
        port = agent.wait_for(r"ready on \S*?:(\d+)")[1]
        body = {"messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 200, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            answer.read()
        pid = agent.process.pid
        return rss(pid) / 1e6, rss(pid, peak=True) / 1e6
