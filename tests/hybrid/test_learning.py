"""A device with a real SLM and a real cloud learns when to ask."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from agent.agent import Piece, Request
from agent.learn.goals import Price
from agent.learn.learner import Learner
from agent.learn.ledger import Ledger
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Provenance
from models.engine.gguf import GgufEngine
from protocol.resolve import Message, Sampling
from server.cloud.app import start
from server.cloud.embedded import EmbeddedUpstream
from tests.hybrid.conftest import answer, cloud_config, linked

QUESTIONS = ("Tell me a fact about whales.", "Why is the sky blue?", "Write about the sea.", "What is bread made of?")


async def _write(agent_engine: GgufEngine, llm: Path, folder: Path, turns: int) -> tuple[list[Piece], Learner]:
    upstream = EmbeddedUpstream(GgufEngine(llm, context=2048, sequences=4, threads=1, hidden=False))
    server = await start(cloud_config(), upstream)
    try:
        async with linked(agent_engine, f"http://127.0.0.1:{server.port}", 0.6) as (agent, _):
            policy = agent.options.policy
            assert isinstance(policy, ThresholdPolicy)
            policy.audit = 0.1
            learner = Learner(Ledger(folder / "ledger.db"), policy, Price(0.3), "entropy", "weak")
            agent.note = learner.note
            pieces = []
            for turn in range(turns):
                for question in QUESTIONS:
                    request = Request([Message("user", question)], 40, Sampling(temperature=0.8, seed=turn))
                    pieces += (await answer(agent, request))[0]
                learner.refresh()
            private = Request([Message("user", QUESTIONS[0])], 20, private=True)
            await answer(agent, private)
            return pieces, learner
    finally:
        await server.close()
        await upstream.close()


def test_the_ledger_has_what_was_asked_and_the_threshold_follows(
    weak: GgufEngine, smollm2: Path, tmp_path: Path
) -> None:
    pieces, learner = asyncio.run(_write(weak, smollm2, tmp_path, 3))
    with closing(learner):
        tokens = [piece.token for piece in pieces if piece.raw]
        asked = [token for token in tokens if token.why is not Why.KEEP and token.provenance is Provenance.CLOUD]
        sample, seen = learner.ledger.sample(), learner.ledger.seen()
        assert len(sample) == len(asked)
        assert sample.u == pytest.approx([token.u for token in asked])
        assert sample.differs.tolist() == [token.id != token.draft for token in asked]
        assert sample.beta == pytest.approx([token.beta for token in asked])
        assert (sample.propensity < 1.0).sum() == sum(token.why is Why.AUDIT for token in asked) > 3
        assert seen.total == pytest.approx(len(tokens), rel=0.02), "a private answer is not in it"
        assert learner.policy.threshold < 0.58, "few steps of so weak a model are above 0.6, but the LLM rejects many"
