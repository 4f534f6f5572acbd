"""From the SLM's distribution x and a resolver's reply to the token that is emitted.

verify   accept the draft with min(1, y_d / x_d), else draw from norm(max(y - x, 0)): the output follows y exactly
         (Leviathan et al., 2023, algorithm 1)
fuse     p = w x + (1 - w) y, then sample; w = 1 when late or private (Floe, arXiv 2602.14302; CoGenesis, 2403.03129).
         w is a constant, or adaptive: c(x) / (c(x) + c(y)), where a side's confidence c is its largest probability
take     the LLM's token

x and y are both shaped by the request's sampling parameters before verify compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from agent.resolver import Reply
from models.sampling import Shaped, shape, softmax, top_ids, uniform
from protocol.resolve import Mode, Sampling

Floats = NDArray[np.float32]
Weight: TypeAlias = float | Literal["adaptive"]

OFFERED = 64  # tokens of x that travel with a question in mode verify

# Tell apart the random decisions of one position; the draft itself is drawn with purpose 0.
_ACCEPT, _RESAMPLE, _THIN = 1, 2, 8


def combine(
    mode: Mode,
    weight: Weight,
    draft: int,
    logits: Floats,
    reply: Reply,
    sampling: Sampling,
    recent: Sequence[int],
    position: int,
) -> int:
    """The token to emit at `position`. `logits` (V,) are the SLM's at this step; `weight` is w of mode fuse."""
    if mode == "fuse":
        if weight == 1.0:
            return draft
        fused = np.log(fuse(softmax(logits), reply, weight) + np.float32(1e-30))
        return shape(fused, sampling, recent).draw_at(sampling.seed, position)
    if reply.tokens and (mode == "take" or reply.tokens[0] == draft):
        return reply.tokens[0]
    x = shape(logits, sampling, recent)
    if reply.tokens:
        return thin(draft, x, reply, sampling.seed, position)
    y = shape(np.log(complete(softmax(logits), reply) + np.float32(1e-30)), sampling, recent)
    if mode == "take":
        return y.draw_at(sampling.seed, position)
    return verify(draft, x, y, len(logits), sampling.seed, position)


def complete(x: Floats, reply: Reply) -> Floats:
    """y over the whole vocabulary, (V,), from its likeliest tokens: the tail's mass lies where x lies.

    A tail of zeros would rule out every token that the reply does not name.
    """
    y = x.copy()
    y[reply.y_ids] = 0.0
    rest = float(y.sum())
    tail = max(0.0, 1.0 - float(reply.y_p.sum()))
    y *= np.float32(tail / rest if rest > 0.0 else 0.0)
    np.add.at(y, reply.y_ids, reply.y_p)
    return y


def fuse(x: Floats, reply: Reply, weight: Weight) -> Floats:
    """w x + (1 - w) y, (V,)."""
    y = complete(x, reply)
    w = adaptive(x, y) if weight == "adaptive" else weight
    return np.float32(w) * x + np.float32(1.0 - w) * y


def adaptive(x: Floats, y: Floats) -> float:
    """w by the confidence of both sides, in (0, 1): who is surer has more of a say (`skerry eval fusion`)."""
    sure, other = float(x.max()), float(y.max())
    return sure / (sure + other)


def verify(draft: int, x: Shaped, y: Shaped, vocab: int, seed: int, position: int) -> int:
    """The rule of mode verify with both distributions at hand."""
    if uniform(seed, position, _ACCEPT) * x.at(draft) < y.at(draft):
        return draft
    residual = np.maximum(dense(y, vocab) - dense(x, vocab), 0.0)
    if residual.sum() <= 0.0:
        return draft
    return Shaped(None, residual).draw(uniform(seed, position, _RESAMPLE))


def offer(x: Shaped, draft: int) -> tuple[NDArray[np.intp], Floats, float]:
    """What a resolver is told of x: its likeliest tokens and the draft (n,), their probabilities (n,), and the mass
    of the rest."""
    ids = top_ids(x.p, OFFERED) if x.ids is None else x.ids[:OFFERED]
    p = x.p[ids] if x.ids is None else x.p[:OFFERED]
    if draft not in ids:
        ids, p = np.append(ids, draft), np.append(p, np.float32(x.at(draft)))
    return ids, p, max(0.0, 1.0 - float(p.sum())) if len(ids) < len(x.p) else 0.0


def thin(draft: int, x: Shaped, reply: Reply, seed: int, position: int) -> int:
    """The resolver refused the draft and drew alternatives, knowing x only where it was offered.

    It drew from r >= max(y - x, 0), with r = y where it did not know x; keeping such a token v with probability
    max(0, 1 - x_v / y_v) makes it a draw from norm(max(y - x, 0)) (rejection sampling). If all are refused the last
    one is taken: with the 8 that the resolver sends, a share below (x's untold mass) ** 8 of the resampled tokens.
    """
    known = set(offer(x, draft)[0].tolist())
    for index, (token, y_p) in enumerate(zip(reply.tokens, reply.tokens_p, strict=True)):
        if token in known or (1.0 - uniform(seed, position, _THIN + index)) * y_p > x.at(token):
            return token
    return reply.tokens[-1]


def dense(shaped: Shaped, vocab: int) -> Floats:
    """(V,), zeros where the distribution has nothing."""
    if shaped.ids is None:
        return shaped.p
    p = np.zeros(vocab, np.float32)
    p[shaped.ids] = shaped.p
    return p
