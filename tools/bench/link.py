"""`skerry bench link`: what a slow link costs, with draft-ahead and without.

Device, proxy and cloud are three processes; device and cloud get half of the cores each. Per answer and token:

    s   time of one step of the SLM alone            e   share of tokens that are escalated
    R   time from a question to its reply            a   share of replies that agree with the draft

A loop that blocks takes s + e R per token; one that goes on drafting loses R only where the reply disagrees, at best
s + e (1 - a) R. Their quotient bounds what draft-ahead alone can gain; a burst can go beyond it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent.agent import Account, Agent, Options, Piece, Request
from agent.breaker import Breaker
from agent.cloud import CloudOptions, CloudResolver
from agent.policy import ThresholdPolicy
from agent.resolver import Provenance
from models.engine.gguf import GgufEngine
from models.engine.threads import physical_cores
from protocol.errors import LinkError
from protocol.resolve import Message
from tools.processes import Child, start_cloud

QUESTIONS = (
    "Why is the sky blue?",
    "How does a refrigerator keep food cold?",
    "Explain how a bicycle stays upright.",
    "What makes bread rise?",
    "Why do we have seasons?",
    "How do fish breathe under water?",
    "What is inflation?",
    "How are rainbows formed?",
)
_AHEAD = 32  # tokens, the agent's default
_PATIENCE = 30.0  # deadline in seconds: nothing may fall back here, or the arms would write different texts


@dataclass(slots=True)
class Run:
    """One arm over all questions."""

    tokens: int = 0
    seconds: float = 0.0
    asked: int = 0
    replies: int = 0
    agreed: int = 0
    waited: float = 0.0
    llm_tokens: int = 0
    reply_seconds: float = 0.0
    texts: list[str] = field(default_factory=list)

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds


async def measure(
    model: Path,
    cloud_model: str,
    *,
    rtt_ms: float,
    escalate: float,
    tokens: int,
    burst: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The object of `skerry bench link --json`."""
    threads = max(1, physical_cores() // 2)
    engine = GgufEngine(model, context=2048, sequences=1, threads=threads, hidden=False)
    cloud, port = start_cloud(cloud_model, threads)
    with cloud, Child([str(port), str(rtt_ms)], module="tools.bench.proxy") as proxy:
        far = int(proxy.wait_for(r"^(\d+)$")[1])
        threshold, step = await _calibrate(engine, escalate, tokens)
        progress(f"SLM alone: {1 / step:.1f} tok/s, threshold {threshold:.3f}")
        async with AsyncExitStack() as stack:
            agents = {
                name: await stack.enter_async_context(_agent(engine, to, threshold, ahead, more))
                for name, (to, ahead, more) in {
                    "blocking": (far, 0, 0),
                    "draft_ahead": (far, _AHEAD, 0),
                    "draft_ahead_burst": (far, _AHEAD, burst),
                    "rtt0": (port, _AHEAD, 0),
                }.items()
            }
            runs = await _take_turns(agents, tokens, progress)
    engine.close()
    return _result(runs, step, threshold, rtt_ms, threads)


def _result(runs: dict[str, Run], step: float, threshold: float, rtt_ms: float, threads: int) -> dict[str, Any]:
    blocking, ahead = runs["blocking"], runs["draft_ahead"]
    e, a = blocking.asked / blocking.tokens, blocking.agreed / max(1, blocking.replies)
    reply = blocking.waited / max(1, blocking.asked)
    bound = (step + e * reply) / (step + e * (1 - a) * reply)
    gain = ahead.tok_s / blocking.tok_s
    return {
        "ratio_blocking": round(gain, 3),
        "bound_blocking": round(bound, 3),
        "share_of_bound": round(gain / bound, 3),
        "ratio_blocking_burst": round(runs["draft_ahead_burst"].tok_s / blocking.tok_s, 3),
        "ratio_rtt0": round(ahead.tok_s / runs["rtt0"].tok_s, 3),
        "acceptance": round(a, 3),
        "escalated": round(e, 3),
        "step_ms": round(step * 1000, 2),
        "reply_ms": round(reply * 1000, 1),
        "reply_ms_draft_ahead": round(ahead.reply_seconds / max(1, ahead.replies) * 1000, 1),
        "rtt_ms": rtt_ms,
        "threshold": round(threshold, 4),
        "threads_each": threads,
        "same_text": all(run.texts == blocking.texts for run in (ahead, runs["rtt0"])),
        **{f"{name}_tok_s": round(run.tok_s, 2) for name, run in runs.items()},
        **{f"{name}_llm_tokens": run.llm_tokens for name, run in runs.items()},
    }


async def _calibrate(engine: GgufEngine, escalate: float, tokens: int) -> tuple[float, float]:
    """The threshold above which a share `escalate` of the SLM's own tokens lies, and the seconds of one step."""
    agent = Agent(engine, Options(ThresholdPolicy(1.0)))
    scores, seconds, steps = [], 0.0, 0
    for question in QUESTIONS:
        pieces, account = await _answer(agent, question, tokens)
        scores += [piece.token.u for piece in pieces]
        seconds += (account.tokens - 1) / account.tok_s
        steps += account.tokens - 1
    agent.scheduler.close()
    return float(np.quantile(scores, 1.0 - escalate)), seconds / steps


async def _take_turns(agents: dict[str, Agent], tokens: int, progress: Callable[[str], None]) -> dict[str, Run]:
    """Every arm answers every question, in an order that rotates, so that drift of the machine hits all alike."""
    names = list(agents)
    runs = {name: Run() for name in names}
    for turn, question in enumerate(QUESTIONS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _add(runs[name], *await _answer(agents[name], question, tokens))
        progress(f"{question} " + ", ".join(f"{name} {run.tok_s:.1f} tok/s" for name, run in runs.items()))
    return runs


def _add(run: Run, pieces: list[Piece], account: Account) -> None:
    run.tokens += account.tokens - 1
    run.seconds += (account.tokens - 1) / account.tok_s
    run.asked += account.asked
    run.waited += account.waited
    run.llm_tokens += account.llm_tokens
    answered = [piece.token for piece in pieces if piece.token.reply_seconds is not None]
    run.replies += len(answered)
    run.reply_seconds += sum(token.reply_seconds or 0.0 for token in answered)
    run.agreed += sum(1 for token in answered if token.id == token.draft)
    run.texts.append("".join(piece.text for piece in pieces))
    if any(piece.token.provenance is Provenance.FALLBACK for piece in pieces):
        raise LinkError("the cloud left a question unanswered: nothing to compare")


@asynccontextmanager
async def _agent(engine: GgufEngine, port: int, threshold: float, ahead: int, burst: int) -> AsyncIterator[Agent]:
    loop = asyncio.get_running_loop()
    options = CloudOptions(url=f"http://127.0.0.1:{port}", deadline=_PATIENCE, burst=burst)
    resolver = CloudResolver(options, engine.tokenizer, Breaker(loop.time, lambda: 0.5), loop.time, lambda: 0.5)
    link = asyncio.create_task(resolver.run())
    if not await resolver.connected(10.0):
        raise LinkError(f"the cloud cannot be reached: {resolver.state}")
    agent = Agent(engine, Options(ThresholdPolicy(threshold), ahead=ahead), resolver)
    try:
        yield agent
    finally:
        agent.scheduler.close()
        link.cancel()
        with suppress(asyncio.CancelledError):
            await link


async def _answer(agent: Agent, question: str, tokens: int) -> tuple[list[Piece], Account]:
    pieces: list[Piece] = []
    async for event in agent.stream(Request([Message("user", question)], max_tokens=tokens)):
        if isinstance(event, Account):
            return pieces, event
        pieces.append(event)
    raise AssertionError("an answer ends with its account")
