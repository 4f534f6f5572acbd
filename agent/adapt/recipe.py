"""How an adapter is trained, and what is told while it is. Known to processes that never load torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Stage = Literal["reading", "training", "done"]


class Recipe(msgspec.Struct, frozen=True):
    """`alpha`: the change is (alpha / rank) * b @ a. `modules`: matrices of each layer, by the names of the model's
    file. `layers`: that many top ones are adapted; 0: all. `rate`: of AdamW at the start; it falls to 0 along a line.
    `batch`: lessons per step. `tokens`: most that go through the model in one pass, padding included; a step of more
    takes several passes, and a longer lesson is left out. `kept_weight`: of the steps to be kept as they are, against
    what is taught. `freeze_a`: only the B matrices learn. `bfloat16`: the frozen weights' type; None: whichever this
    processor is faster with."""

    rank: Annotated[int, Meta(ge=1, le=256)] = 8
    alpha: Annotated[float, Meta(gt=0)] = 16.0
    modules: tuple[str, ...] = ("attn_q", "attn_v", "attn_output", "ffn_down")
    layers: Annotated[int, Meta(ge=0)] = 10
    rate: Annotated[float, Meta(gt=0, le=1)] = 2e-3
    batch: Annotated[int, Meta(ge=1, le=1024)] = 2
    epochs: Annotated[float, Meta(gt=0, le=1000)] = 6.0
    tokens: Annotated[int, Meta(ge=2)] = 2048
    kept_weight: Annotated[float, Meta(ge=0)] = 0.5
    freeze_a: bool = False
    bfloat16: bool | None = None
    seed: Annotated[int, Meta(ge=0)] = 0


class Progress(msgspec.Struct, frozen=True):
    """`step` of `steps`; `loss`: mean of the last step's lessons, in nats; `examples_per_s` and `eta_s`: since this
    run began; `rss_mb`: the process' memory now; `left_out`: lessons that cannot be learned from."""

    stage: Stage
    step: int
    steps: int
    loss: float
    examples_per_s: float
    eta_s: float
    rss_mb: float
    left_out: int = 0
