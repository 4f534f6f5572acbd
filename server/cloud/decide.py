"""What an Answer says, from the LLM's logits: the token to emit and the likeliest tokens. Same tokenizer.

Verify is speculative sampling (Leviathan et al., 2023, theorem 3.5) with a truncated x: the device sends its sampling
distribution x' on a support S, the cloud knows y' everywhere. The draft d is accepted with min(1, y'_d / x'_d), else
a token comes from norm(max(y' - x', 0)). Outside S the cloud does not know x', only its mass, so there it proposes
from y' >= max(y' - x', 0) and the device, which knows x', keeps a proposal v with max(0, 1 - x'_v / y'_v) or goes on
to the next one: rejection sampling, so what is emitted follows y' whatever x' is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.sampling import Floats, Shaped, log_softmax, shape, top_ids, uniform
from protocol.errors import ProtocolError, RequestError
from protocol.resolve import Answer, Ask, Open, pack_floats, pack_ids, unpack_floats, unpack_ids

CANDIDATES = 8  # the most alternatives of one Answer
MAX_TOP = 1024  # the most log-probabilities of one Answer

# Purposes for `uniform`. Taking shares the device's own (0): equal numbers make equal draws likelier. What verify
# draws must be independent of how the device drew its draft, and of what it draws to thin the candidates out.
TAKE, ACCEPT, CANDIDATE = 0, 64, 65


class Support(NamedTuple):
    """What the device sent of its sampling distribution: ids (n,), p (n,) float64, and the mass elsewhere."""

    ids: NDArray[np.intp]
    p: NDArray[np.float64]
    tail: float


def take(logits: Floats, request: Open, answer: Sequence[int]) -> int:
    """The LLM's own token after `answer`."""
    return _take(shape(logits, request.sampling, answer), request, len(answer))


def _take(y: Shaped, request: Open, position: int) -> int:
    return y.draw(uniform(request.sampling.seed, position, TAKE))


def decide(logits: Floats, request: Open, ask: Ask, answer: Sequence[int]) -> Answer:
    """The Answer to `ask`, from logits (V,). Raises RequestError."""
    tokens: list[int] = []
    if request.mode != "fuse":
        y = shape(logits, request.sampling, answer)
        verify = request.mode == "verify"
        tokens = _verify(y, request, ask, len(answer), len(logits)) if verify else [_take(y, request, len(answer))]
    logp = log_softmax(logits)
    ids = top_ids(logp, min(request.top, MAX_TOP)) if request.top > 0 else np.empty(0, np.intp)
    return Answer(
        ask.session,
        ask.step,
        tokens=tokens,
        y_ids=pack_ids(ids),
        y_logp=pack_floats(logp[ids]),
        y_draft=float(np.exp(logp[ask.draft])) if 0 <= ask.draft < len(logp) else -1.0,
        tokens_p=pack_floats(np.array([y.at(token) for token in tokens], np.float32)),
    )


def _verify(y: Shaped, request: Open, ask: Ask, position: int, vocab: int) -> list[int]:
    x = support(ask, vocab)
    seed = request.sampling.seed
    x_draft = float(x.p[x.ids == ask.draft][0])
    if uniform(seed, position, ACCEPT) * x_draft < y.at(ask.draft):
        return [ask.draft]
    rest = residual(y, x, vocab)
    if rest.p.sum() <= 0.0:
        return [ask.draft]
    tokens: list[int] = []
    for number in range(CANDIDATES):
        tokens.append(rest.draw(uniform(seed, position, CANDIDATE + number)))
        if x.tail <= 0.0 or tokens[-1] in x.ids:
            break
    return tokens


def residual(y: Shaped, x: Support, vocab: int) -> Shaped:
    """max(y' - x', 0) on S and y' elsewhere, not normalised, on y's own ids."""
    known = np.zeros(vocab, np.float64)
    known[x.ids] = x.p
    here = known if y.ids is None else known[y.ids]
    return Shaped(y.ids, np.maximum(y.p - here, 0.0).astype(np.float32))


def support(ask: Ask, vocab: int) -> Support:
    """What `ask` says of x'. Raises RequestError where that makes no sense."""
    try:
        ids, p = unpack_ids(ask.x_ids).astype(np.intp), unpack_floats(ask.x_p).astype(np.float64)
    except ProtocolError as error:
        raise RequestError(str(error), "x_ids") from None
    if len(ids) != len(p) or not (ids < vocab).all() or len(np.unique(ids)) != len(ids):
        raise RequestError("x_ids and x_p must be equally long and name each token of the vocabulary once", "x_ids")
    if not (np.isfinite(p).all() and (p >= 0).all() and 0.0 <= ask.x_tail <= 1.0):
        raise RequestError("x_p and x_tail must be probabilities", "x_p")
    if ask.draft not in ids:
        raise RequestError("in mode verify x must hold the draft", "x_ids")
    return Support(ids, p, ask.x_tail)
