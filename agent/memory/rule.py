"""From neighbours to a token: who is believed, and when that is good enough not to ask anybody else.

The neighbours vote, as in the kNN language model (Khandelwal et al., 2020, equation 2): p(t) is the share of the
weight of those whose token is t, weight = trust * exp(similarity / T). The bandwidth T is the distance of the nearest
one, d = 1 - similarity: a neighbour that is as good as identical outvotes all others, of far ones many must agree. The
likeliest token is the candidate, and with similarity, trust and tail of its best supporter

    score = similarity * trust * p(token) * (1 + tail / 8) / 2 * x(token) ** min(1/4, 1 - similarity)

Every factor is at most 1, so the score never exceeds the similarity: what is not similar is no hit, nor what the
neighbours disagree about, what comes after other words, or, the less similar the more, what the SLM finds implausible.
docs/memory.md shows what each factor is worth, and that a fitted logistic regression is hardly better.

It is a hit if it passes the content gate (x(token) is not negligible) and the score reaches theta, which `Evidence`
learns: one for candidates that confirm the draft, one for those that would replace it. The latter are held to the same
bound on their errors, and to having been right more often than the draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.memory.base import Neighbour
from agent.memory.key import TAILS
from agent.memory.rule_evidence import Evidence

NEIGHBOURS = 8  # k
PLAUSIBLE = 1e-3  # the content gate: least x of a hit
SAME = 0.995  # cosine from which on two keys with equal tails stand for one and the same step
_MOST_DOUBT = 0.25  # largest power of x in the score


@dataclass(frozen=True, slots=True)
class Candidate:
    """What memory would say. `ids` (n,), `p` (n,): the neighbours' vote over tokens, likeliest first, summing to 1.
    `similarity`: the best supporter's. `supporters`: ids of the entries that say `token`, strongest first; `origin`
    made the first of them."""

    token: int
    ids: NDArray[np.intp]
    p: NDArray[np.float32]
    similarity: float
    score: float
    hit: bool
    supporters: tuple[int, ...]
    origin: bytes


def judge(
    neighbours: Sequence[Neighbour], x: Callable[[int], float], draft: int, evidence: Evidence
) -> Candidate | None:
    """The candidate, None if no neighbour is trusted. `x`: the SLM's probability of a token at temperature 1."""
    trusted = [near for near in neighbours if near.trust > 0.0]
    if not trusted:
        return None
    nearest = max(near.similarity for near in trusted)
    bandwidth = 1.0 - min(SAME, nearest)
    weighted = [(near.trust * math.exp((near.similarity - nearest) / bandwidth), near) for near in trusted]
    votes: dict[int, float] = {}
    for weight, near in weighted:
        votes[near.token] = votes.get(near.token, 0.0) + weight
    total = sum(votes.values())
    ranked = sorted(votes, key=lambda token: (-votes[token], token))
    token = ranked[0]
    supporters = sorted((pair for pair in weighted if pair[1].token == token), key=lambda pair: -pair[0])
    best, likely = supporters[0][1], max(0.0, x(token))
    similarity = min(1.0, max(0.0, best.similarity))
    score = similarity * best.trust * votes[token] / total
    score *= (1 + best.tail / TAILS[-1]) / 2 * likely ** min(_MOST_DOUBT, 1.0 - similarity)
    return Candidate(
        token,
        np.array(ranked, np.intp),
        np.array([votes[t] / total for t in ranked], np.float32),
        similarity,
        score,
        likely >= PLAUSIBLE and evidence.allows(score, agree=token == draft),
        tuple(near.id for _, near in supporters),
        best.origin,
    )
