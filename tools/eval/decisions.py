"""The seam between recordings and arms: all that a policy can see or earn at each step of one pair of models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.uncertainty import PERTURBATIONS

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Ints = NDArray[np.int32]

PROJECTED = 16  # numbers of `hidden`
_MASK = (1 << 64) - 1  # numpy takes no negative seeds
_TEMPERATURES = np.linspace(0.0, 2.0, PERTURBATIONS)[1:]  # U-HLM's, without the first
FEATURES = ("entropy", "1 - p_max", "1 - margin", "position / 64")  # columns of `features`


@dataclass(frozen=True, slots=True)
class Decisions:
    """n steps of one pair of models, request after request, in the order of their positions. Shapes (n,) where none
    is given.

    An escalation of step i costs `prompt_bytes[i]` up and `reply_bytes[i]` down; see `traffic` for all of it.
    """

    slm: str
    llm: str
    u: Floats  # uncertainty: normalised entropy
    u_other: Floats  # news: u's alternative (tools/eval/news.py); text: H(x) / ln V again
    p_max: Floats  # x of the draft
    margin: Floats  # x_1 - x_2
    temperature: Floats  # U-HLM's measure, K = 20 draws
    beta: Floats  # max(0, 1 - y_d / x_d)
    y_below_x: Bools  # y_d < x_d
    differs: Bools  # the draft is not what the LLM says, greedily
    slm_right: Bools  # news: the draft is the gold label; text: it is what the LLM says
    llm_right: Bools  # news: the LLM's label is the gold label; text: always
    item: Ints  # the request, numbered from 0 without gaps
    document: Ints  # the article or row that the request is about
    position: Ints  # in the answer
    label: Ints  # news: index of the gold label; text: index of the task
    labels: tuple[str, ...]  # what `label` indexes
    features: Floats  # (n, len(FEATURES))
    hidden: Halves  # (n, PROJECTED): seeded random projection of the last hidden state at the step
    state: Halves  # (n, d): the last hidden state itself
    prompt_bytes: Ints  # the step's Ask, without new tokens
    token_bytes: Ints  # what the step's own token adds to the next Ask
    reply_bytes: Ints  # the Answer
    open_bytes: Ints  # of the step's request: Open and Close, once each

    def traffic(self, escalated: Bools) -> tuple[int, int]:
        """Bytes (up, down) on the cloud link if the steps in the mask (n,) are escalated. Each request with an
        escalation is opened and closed once; the tokens before its last escalation go up once, with the Asks. A
        device that opens every request ahead of its first question, as the agent does while its link stands, pays
        `open_bytes` for the others too."""
        asked = np.flatnonzero(escalated)
        last = np.full(int(self.item.max(initial=-1)) + 1, -1)
        last[self.item[asked]] = asked  # the latest wins: indices rise
        up = int(self.prompt_bytes[asked].sum()) + int(self.open_bytes[last[last >= 0]].sum())
        up += int(self.token_bytes[np.arange(len(self.item)) < last[self.item]].sum())
        return up, int(self.reply_bytes[asked].sum())


def features(entropy: Floats, p_max: Floats, margin: Floats, position: Ints) -> Floats:
    """(n, len(FEATURES)), each about 0 to 1."""
    return np.stack([entropy, 1 - p_max, 1 - margin, position / 64], axis=1).astype(np.float32)


def projected(state: Halves, seed: int) -> Halves:
    """(n, PROJECTED): Gaussian random projection of unit vectors (Johnson and Lindenstrauss, 1984), times sqrt(d), so
    that numbers are about 1."""
    wide = state.astype(np.float32)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-6)
    basis = np.random.default_rng(seed & _MASK).standard_normal((state.shape[1], PROJECTED), np.float32)
    return (wide @ basis).astype(np.float16)


def rejection(x_d: Floats, y_d: Floats) -> Floats:
    """beta (n,): how likely the LLM would reject a draft that has probability x_d in x and y_d in y."""
    return np.maximum(0.0, 1.0 - y_d / np.maximum(x_d, 1e-30), dtype=np.float32)


def warmed(logits: Floats, draft: int) -> Floats:
    """(K - 1,): the draft's probability at each of U-HLM's temperatures above 0, from logits (V,)."""
    z = logits - logits[draft]
    return np.array([1.0 / np.exp(z / np.float32(t)).sum() for t in _TEMPERATURES], np.float32)


def perturbed(warm: Floats, seed: int) -> Floats:
    """U-HLM's uncertainty (n,) of `warm` (n, K - 1), one uniform number per step and temperature: the share of K draws
    that are not the draft. The first temperature, 0, always draws it."""
    drawn = np.random.default_rng(seed & _MASK).random(warm.shape)
    share: Floats = ((drawn >= warm).sum(axis=1) / PERTURBATIONS).astype(np.float32)
    return share
