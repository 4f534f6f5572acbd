"""LLMs in this process, loaded once; a foreign server that runs the same model."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.engine.gguf import GgufEngine, GgufTokenizer
from server.cloud.embedded import EmbeddedUpstream


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> GgufTokenizer:
    return GgufTokenizer.open(smollm2)


@pytest.fixture(scope="session")
def llm(smollm2: Path) -> Iterator[EmbeddedUpstream]:
    engine = GgufEngine(smollm2, context=4096, sequences=4, threads=1, hidden=False)
    upstream = EmbeddedUpstream(engine, prompt_tokens=512, answer_tokens=256)
    yield upstream
    asyncio.run(upstream.close())


@pytest.fixture(scope="session")
def alone(smollm2: Path) -> Iterator[GgufEngine]:
    """The same model by itself: what an LLM alone would write."""
    engine = GgufEngine(smollm2, context=1024, sequences=1, threads=1, hidden=False)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def foreign(smollm2: Path) -> Iterator[str]:
    """The base address of llama.cpp's own HTTP server, running SmolLM2 in a process of its own."""
    script = Path(__file__).with_name("llama_server.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(smollm2)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://"), "llama.cpp's server did not start"
    yield f"{address}/v1"
    process.kill()
    process.wait()
