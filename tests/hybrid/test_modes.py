"""What each mode promises, with a real SLM, a real LLM and a socket in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from scipy.stats import chisquare

from agent.agent import Agent, Options, Request
from agent.policy import ThresholdPolicy
from agent.resolver import Provenance
from models.chat import render
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from models.engine.onnx import OnnxEngine
from models.sampling import shape, softmax
from protocol.resolve import Message, Mode, Sampling
from server.cloud.app import start
from server.cloud.backends import open_upstream
from server.cloud.config import UpstreamSection
from tests.hybrid.conftest import answer, cloud_config, linked

QUESTION = [Message("user", "Tell me a fact about whales.")]


@pytest.fixture(scope="module")
def cloud_file(smollm2: Path) -> Path:
    return smollm2


@asynccontextmanager
async def hybrid(device: Engine, llm: Path, threshold: float, **settings: Any) -> AsyncIterator[Agent]:
    config = replace(cloud_config(), upstream=UpstreamSection(model=str(llm), context=2048, threads=1))
    upstream = await open_upstream(config, Path)
    server = await start(config, upstream)
    try:
        async with linked(device, f"http://127.0.0.1:{server.port}", threshold, **settings) as (agent, _):
            yield agent
    finally:
        await server.close()
        await upstream.close()


def alone(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """Greedy, by the model itself."""
    place = engine.open(prompt, count)
    feed, made = place.align(prompt), []
    for _ in range(count):
        (step,) = engine.forward([(place, feed)])
        made.append(int(step.logits.argmax()))
        if made[-1] in engine.tokenizer.eog:
            break
        feed = [made[-1]]
    place.close()
    return made


def prompt_of(engine: Engine) -> list[int]:
    return engine.tokenizer.encode(render(engine.tokenizer, QUESTION), special=True)


@pytest.mark.parametrize("mode", ["take", "verify"])
@pytest.mark.parametrize("ahead", [0, 16])
def test_threshold_zero_equals_the_llm_alone(
    weak: GgufEngine, strong: GgufEngine, cloud_file: Path, mode: Mode, ahead: int
) -> None:
    """Greedy, one tokenizer: token for token, drafting ahead or not."""

    async def run() -> list[int]:
        async with hybrid(weak, cloud_file, 0.0, mode=mode, ahead=ahead) as agent:
            pieces, account = await answer(agent, Request(QUESTION, max_tokens=40))
            assert account.counts["cloud"] == account.tokens
            return [piece.token.id for piece in pieces]

    expected = alone(strong, prompt_of(strong), 40)
    assert alone(weak, prompt_of(weak), 40) != expected, "the pair must differ for this to mean anything"
    assert asyncio.run(run()) == expected


@pytest.mark.parametrize("mode", ["take", "verify"])
def test_a_device_in_onnx_and_an_llm_in_gguf_speak_token_ids(
    smollm2_int4: Path, strong: GgufEngine, cloud_file: Path, mode: Mode
) -> None:
    """The tokenizers are one, whatever file they were read from."""
    device = OnnxEngine(smollm2_int4, context=512, sequences=1, threads=1)
    assert device.tokenizer.fingerprint == strong.tokenizer.fingerprint

    async def run() -> list[int]:
        async with hybrid(device, cloud_file, 0.0, mode=mode, ahead=16) as agent:
            pieces, account = await answer(agent, Request(QUESTION, max_tokens=24))
            assert account.counts["cloud"] == account.tokens
            return [piece.token.id for piece in pieces]

    assert asyncio.run(run()) == alone(strong, prompt_of(strong), 24)
    device.close()


def test_an_llm_in_onnx_helps_a_device_in_gguf(weak: GgufEngine, smollm2_onnx: Path) -> None:
    async def run() -> list[int]:
        async with hybrid(weak, smollm2_onnx, 0.0, mode="take") as agent:
            pieces, account = await answer(agent, Request(QUESTION, max_tokens=24))
            assert account.counts["cloud"] == account.tokens
            return [piece.token.id for piece in pieces]

    llm = OnnxEngine(smollm2_onnx, context=512, sequences=1, threads=1, hidden=False)
    assert asyncio.run(run()) == alone(llm, prompt_of(llm), 24)
    llm.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fuse_with_weight_one_equals_the_slm_alone(weak: GgufEngine, cloud_file: Path, temperature: float) -> None:
    request = Request(QUESTION, max_tokens=30, sampling=Sampling(temperature=temperature, seed=5))

    async def run() -> tuple[list[int], list[int]]:
        async with hybrid(weak, cloud_file, 0.1, mode="fuse", weight=1.0) as agent:
            fused, account = await answer(agent, request)
            assert account.counts["cloud"] > 0
        agent = Agent(weak, Options(ThresholdPolicy(1.0)))
        slm, _ = await answer(agent, request)
        agent.scheduler.close()
        return [p.token.id for p in fused], [p.token.id for p in slm]

    fused, slm = asyncio.run(run())
    assert fused == slm


def test_fuse_with_weight_zero_equals_the_llm_alone(weak: GgufEngine, strong: GgufEngine, cloud_file: Path) -> None:
    async def run() -> list[int]:
        async with hybrid(weak, cloud_file, 0.0, mode="fuse", weight=0.0) as agent:
            pieces, _ = await answer(agent, Request(QUESTION, max_tokens=30))
            return [piece.token.id for piece in pieces]

    assert asyncio.run(run()) == alone(strong, prompt_of(strong), 30)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0, top_k=0), Sampling(temperature=1.3, top_k=40), Sampling(temperature=0.9, top_p=0.9)],
    ids=["whole vocabulary", "top_k", "top_p"],
)
def test_verify_reproduces_the_llm_distribution(
    weak: GgufEngine, strong: GgufEngine, cloud_file: Path, sampling: Sampling
) -> None:
    """The first token, drawn anew with 250 seeds, follows the LLM's y and not the SLM's x (chi-square)."""
    count = 250

    async def run() -> Counter[int]:
        drawn: Counter[int] = Counter()
        async with hybrid(weak, cloud_file, 0.0, mode="verify") as agent:
            for seed in range(count):
                seeded = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=seed)
                pieces, account = await answer(agent, Request(QUESTION, max_tokens=1, sampling=seeded))
                assert account.counts["cloud"] == 1
                drawn[pieces[0].token.id] += 1
        return drawn

    drawn = asyncio.run(run())
    x, y = (first_distribution(engine, sampling) for engine in (weak, strong))
    assert goodness(drawn, y, count) > 1e-3
    assert goodness(drawn, x, count) < 1e-3, "x and y are too alike for this to mean anything"


def first_distribution(engine: GgufEngine, sampling: Sampling) -> np.ndarray[Any, Any]:
    place = engine.open(prompt_of(engine), 1)
    (step,) = engine.forward([(place, place.align(prompt_of(engine)))])
    shaped = shape(step.logits.copy(), sampling)
    place.close()
    if shaped.ids is None:
        return shaped.p.astype(np.float64)
    dense = np.zeros_like(softmax(step.logits), dtype=np.float64)
    dense[shaped.ids] = shaped.p
    return dense


def goodness(drawn: Counter[int], p: np.ndarray[Any, Any], count: int) -> float:
    """p-value of the counts under p; tokens that are expected fewer than 5 times make one class."""
    common = np.flatnonzero(p * count >= 5)
    seen = np.array([drawn[int(token)] for token in common] + [0.0])
    expected = np.append(p[common], max(1e-9, 1 - p[common].sum())) * count
    seen[-1] = count - seen.sum()
    return float(chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)


def test_bursts_are_the_llms_own_tokens(weak: GgufEngine, strong: GgufEngine, cloud_file: Path) -> None:
    """With threshold 0 the text is the LLM's, and most of it comes without a question of its own."""

    async def run() -> tuple[list[int], int]:
        async with hybrid(weak, cloud_file, 0.0, mode="take", burst=8, ahead=0) as agent:
            pieces, account = await answer(agent, Request(QUESTION, max_tokens=40))
            return [piece.token.id for piece in pieces], account.asked

    tokens, asked = asyncio.run(run())
    assert tokens == alone(strong, prompt_of(strong), 40)
    assert asked < 40


def test_same_seed_same_text_through_the_cloud(weak: GgufEngine, cloud_file: Path) -> None:
    request = Request(QUESTION, max_tokens=40, sampling=Sampling(temperature=1.0, seed=11))

    async def run(ahead: int) -> list[int]:
        async with hybrid(weak, cloud_file, 0.15, mode="verify", ahead=ahead) as agent:
            pieces, account = await answer(agent, request)
            assert account.counts["cloud"] > 0
            assert account.counts["local"] > 0
            return [piece.token.id for piece in pieces]

    assert asyncio.run(run(0)) == asyncio.run(run(16)) == asyncio.run(run(16))


def test_two_tokenizers_speak_bytes(weak: GgufEngine, qwen: Path) -> None:
    """SmolLM2 on the device, Qwen in the cloud: what Qwen wants to say arrives in SmolLM2's tokens."""

    async def run() -> tuple[str, list[Provenance | None], int]:
        async with hybrid(weak, qwen, 0.0, mode="take") as agent:
            pieces, account = await answer(
                agent, Request([Message("user", "What is the capital of France? One word.")], max_tokens=8)
            )
            return "".join(p.text for p in pieces), [p.token.provenance for p in pieces], account.llm_tokens

    text, provenance, llm_tokens = asyncio.run(run())
    assert text.strip(" .") == "Paris"
    assert set(provenance) == {Provenance.CLOUD}
    assert llm_tokens >= len(provenance)
