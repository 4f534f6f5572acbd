"""Which adapter a request gets, without anything that is trained.

Each adapter carries the centroid of its prompts; a request gets softmax(cos / T) over the centroids of those that are
near, the likeliest m of them mixed. If none is near, the bare model answers.

What a prompt is compared by is the bare model's last hidden state at its end, standardised as memory's keys are
(agent/memory/key.py), after no more than its first and its last 32 tokens: the beginning tells the system's
instructions, the end the question. Measured with SmolLM2 on six prompts each of eleven tasks (BBC articles with three
sets of labels in one wording, summary, headline, explanation; code, complaints, extraction, translation, chat), the
nearest of the others' centroids names the task of 97 %. The same state after the last 64 tokens: 59 %, after the last
128: 82 %; the mean over the tokens' states instead of the last one: 70 % at best. Not standardised, all cosines lie
above 0.8. Of prompts of a kind that no adapter knows 8 % come as near as `adapt.near` = 0.65, of the others 98 % do
(chat is no one kind of prompt, and not counted).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agent.adapt.lesson import Lesson
from agent.memory.key import CALIBRATION, KeyMaker
from models.engine.base import Engine, Mix, Tokenizer

Floats = NDArray[np.float32]

_END = 32  # tokens of each end of a prompt that are read
_LESSONS = 64  # that a centroid is the mean of, at most
_TEMPERATURE = 0.05  # T: one that is 0.1 nearer has 7 times the say


def excerpt(prompt: Sequence[int]) -> list[int]:
    """The tokens of a prompt that it is compared by."""
    return list(prompt if len(prompt) <= 2 * _END else [*prompt[:_END], *prompt[-_END:]])


class Router:
    """`keys`: the bare model's. `mix`: most adapters at once, 1: the nearest alone. `near`: least cosine of one."""

    def __init__(self, keys: KeyMaker, mix: int = 1, near: float = 0.65) -> None:
        self._keys = keys
        self._mix = mix
        self._near = near

    def choose(self, engine: Engine, prompt: Sequence[int], centroids: Sequence[tuple[str, Floats]]) -> Mix:
        """Reads the prompt with the bare model. On the engine's thread. `centroids`: by adapter, (d,) each."""
        fitting = [(id, centroid) for id, centroid in centroids if centroid.shape == (engine.info.width,)]
        if not fitting:
            return ()
        return route(embed(engine, self._keys, prompt), fitting, self._mix, self._near)


def embed(engine: Engine, keys: KeyMaker, prompt: Sequence[int]) -> Floats:
    """(d,) What the prompt's centroid is compared with, of length 1. `keys`: the bare model's."""
    return keys.standardise(engine.last_hidden(excerpt(prompt)))


def route(prompt: Floats, centroids: Sequence[tuple[str, Floats]], most: int, near: float) -> Mix:
    """pi = softmax(cos / T), cut to the `most` likeliest that are `near`, summing to 1; () if none is."""
    cosines = sorted(((_cosine(prompt, centroid), id) for id, centroid in centroids), reverse=True)
    chosen = [(cosine, id) for cosine, id in cosines[:most] if cosine >= near]
    if not chosen:
        return ()
    weights = np.exp((np.array([cosine for cosine, _ in chosen]) - chosen[0][0]) / _TEMPERATURE)
    shares = weights / weights.sum()
    return tuple(sorted((id, float(share)) for (_, id), share in zip(chosen, shares, strict=True)))


def centroid(
    states: Callable[[Sequence[int]], Floats], tokenizer: Tokenizer, lessons: Sequence[Lesson]
) -> Floats | None:
    """(d,) Of the lessons' prompts, of length 1. `states`: the bare model's last hidden states (T, d) at given tokens,
    whoever computes them. None if the prompts have no direction in common."""
    scale = KeyMaker.of(b"", [states(tokenizer.encode(text, start=True)) for text in CALIBRATION])
    seen = [scale.standardise(states(excerpt(prompt_of(one)))[-1]) for one in lessons[:_LESSONS]]
    mean = np.array(seen).mean(axis=0)
    length = float(np.linalg.norm(mean))
    return mean / np.float32(length) if 0.0 < length < np.inf else None


def prompt_of(lesson: Lesson) -> list[int]:
    """What was read before the answer."""
    return lesson.tokens[: lesson.prompt or lesson.targets[0].position]


def _cosine(a: Floats, b: Floats) -> float:
    """No BLAS on the engine's thread."""
    norms = float(np.einsum("i,i", a, a)) * float(np.einsum("i,i", b, b))
    return float(np.einsum("i,i", a, b)) / norms**0.5 if norms > 0.0 else -1.0
