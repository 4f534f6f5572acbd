"""Recorded steps as the evaluations' arms see them, made up with known properties."""

from __future__ import annotations

import numpy as np

from tools.eval.decisions import Decisions, features

ASK, REPLY, OPEN, TOKEN = 60, 80, 500, 5  # bytes


def decisions(
    requests: int,
    steps: int = 1,
    *,
    labels: int = 4,
    slope: float = 0.9,
    by_label: float = 0.0,
    blind: bool = False,
    slm: str = "small",
    seed: int = 0,
) -> Decisions:
    """The LLM differs with probability `slope` * u, plus or minus `by_label`, growing with the label. `blind`: u says
    nothing, and another feature all."""
    rng = np.random.default_rng(seed)
    n = requests * steps
    item = np.repeat(np.arange(requests), steps).astype(np.int32)
    label = np.repeat(rng.integers(0, labels, requests), steps).astype(np.int32)
    u = rng.beta(1.5, 2.5, n).astype(np.float32)
    p = np.clip(slope * u + by_label * (2 * label / max(1, labels - 1) - 1), 0.02, 0.98)
    differs = rng.random(n) < p
    beta = np.where(differs, rng.beta(9, 1, n), rng.beta(1, 20, n)).astype(np.float32)
    seen = rng.random(n).astype(np.float32) if blind else u
    position = np.tile(np.arange(steps, dtype=np.int32), requests)
    state = rng.standard_normal((n, 24)).astype(np.float16)
    full = np.full(n, 1, np.int32)
    return Decisions(
        slm=slm,
        llm="large",
        u=seen,
        u_other=seen,
        p_max=1 - u,
        margin=1 - u,
        temperature=(np.round(seen * 20) / 20).astype(np.float32),
        beta=beta,
        y_below_x=beta > 0,
        differs=differs,
        slm_right=~differs,
        llm_right=np.ones(n, bool),
        item=item,
        document=item.copy(),
        position=position,
        label=label,
        labels=tuple("abcdefgh"[:labels]),
        features=features(seen, 1 - u, 1 - u, position),
        hidden=state[:, :16],
        state=state,
        prompt_bytes=ASK * full,
        token_bytes=TOKEN * full,
        reply_bytes=REPLY * full,
        open_bytes=OPEN * full,
    )
