"""From neighbours to a token: who is believed, and when that is good enough not to ask anybody else.

The neighbours vote, as in the kNN language model (Khandelwal et al., 2020, equation 2): p(t) is the share of the
weight of those whose token is t, weight = trust * exp(similarity / T). The likeliest token is the candidate, and

    score = similarity * p(token) * (1 + tail / 8) / 2 * x(token) ** (1/4)

with similarity and tail of its best supporter. Every factor is at most 1, so the score never exceeds the similarity:
what is not similar is no hit, nor what the neighbours disagree about, what comes after other words, or what the SLM
itself finds implausible (the content gate). On recorded steps each factor makes the score a better judge of whether
the candidate is right, and a fitted logistic regression on them is hardly better (docs/memory.md).

The very same step once more (cosine over 0.995, the last 8 tokens equal) is a case of its own: only its entries vote,
and the score is similarity * p(token). That the SLM finds the token unlikely is what made it ask the first time.

It is a hit if x(token) is not negligible and the score reaches theta, which `Evidence` learns: one for candidates that
confirm the draft, one for those that would replace it. The latter are held to the same bound on their errors, so that
they are right more often than the draft.
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
_TEMPERATURE = 0.1  # T, in units of cosine


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
    same = [near for near in trusted if near.similarity >= SAME and near.tail == TAILS[-1]]
    weighted = [(_weight(near), near) for near in same or trusted]
    votes: dict[int, float] = {}
    for weight, near in weighted:
        votes[near.token] = votes.get(near.token, 0.0) + weight
    total = sum(votes.values())
    ranked = sorted(votes, key=lambda token: (-votes[token], token))
    token = ranked[0]
    supporters = sorted((pair for pair in weighted if pair[1].token == token), key=lambda pair: -pair[0])
    best = supporters[0][1]
    similarity, likely = max(0.0, best.similarity), x(token)
    score = similarity * votes[token] / total
    if not same:
        score *= (1 + best.tail / TAILS[-1]) / 2 * max(0.0, likely) ** 0.25
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


def _weight(near: Neighbour) -> float:
    return near.trust * math.exp((near.similarity - 1.0) / _TEMPERATURE)
