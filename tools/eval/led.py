"""Recordings of open text: the LLM's greedy answers, and what the SLM sees when it is led along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.uncertainty import Softmax
from models.chat import encode_chat
from models.engine.base import Engine, Step, Tokenizer
from models.sampling import top_ids
from tools.eval.decisions import Floats, Halves, Ints, warmed
from tools.eval.recordings import Model, Progress, drive, name, recorded
from tools.eval.tasks import Prompt

TOP = 64  # tokens of x and y that are kept
_RECIPE = 1  # raised when a recording would come out differently


@dataclass(frozen=True, slots=True)
class Written:
    """The LLM's n tokens of one answer, greedy; the last one may end it. `top_ids`, `top_y` (n, TOP): y's likeliest,
    largest first; `entropy` (n,): H(y) / ln V."""

    ids: Ints
    top_ids: Ints
    top_y: Floats
    entropy: Floats


@dataclass(frozen=True, slots=True)
class Followed:
    """m steps of the SLM along one answer. `token` (m,): the answer in the SLM's tokens; `begins` (m,): the bytes of
    it before each step; `top_ids`, `top_x` (m, TOP): x's likeliest, largest first; `entropy` (m,): H(x) / ln V;
    `warm` (m, K - 1): the draft's probability at U-HLM's temperatures above 0; `hidden` (m, d)."""

    token: Ints
    begins: Ints
    top_ids: Ints
    top_x: Floats
    entropy: Floats
    warm: Floats
    hidden: Halves


def written(llm: Model, prompts: Sequence[Prompt], cache: Path, say: Progress) -> list[Written]:
    """The LLM's answer to each prompt."""
    paths = [cache / "text" / name(_RECIPE, llm.fingerprint, p.max_tokens, messages=p.messages) for p in prompts]

    def record(wave: Sequence[int]) -> list[Written]:
        return _write(llm.engine, [prompts[index] for index in wave])

    return recorded(Written, paths, record, say)


def followed(
    slm: Model, llm: Model, prompts: Sequence[Prompt], answers: Sequence[Written], cache: Path, say: Progress
) -> list[Followed]:
    """The SLM's steps along each answer."""
    key = (_RECIPE, slm.fingerprint, llm.fingerprint)
    paths = [
        cache / "text" / name(*key, prompt.max_tokens, answer.ids.tolist(), messages=prompt.messages)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]

    def record(wave: Sequence[int]) -> list[Followed]:
        return _follow(
            slm.engine, [prompts[index] for index in wave], [answers[index] for index in wave], llm.tokenizer
        )

    return recorded(Followed, paths, record, say)


def _write(llm: Engine, prompts: Sequence[Prompt]) -> list[Written]:
    rows: list[list[tuple[int, Ints, Floats, float]]] = [[] for _ in prompts]
    belief = Softmax(llm.info.vocab)

    def greedy(index: int, step: Step) -> int | None:
        token = belief.load(step.logits).likeliest
        rows[index].append((token, *_likeliest(step, belief), belief.entropy()))
        ends = token in llm.tokenizer.eog or len(rows[index]) >= prompts[index].max_tokens
        return None if ends else token

    drive(llm, [encode_chat(llm.tokenizer, prompt.messages) for prompt in prompts], prompts, greedy)
    return [
        Written(np.array(ids, np.int32), np.stack(tops), np.stack(shares), np.array(entropy, np.float32))
        for ids, tops, shares, entropy in (zip(*row, strict=True) for row in rows)
    ]


def _follow(slm: Engine, prompts: Sequence[Prompt], answers: Sequence[Written], speech: Tokenizer) -> list[Followed]:
    targets = [retold(slm.tokenizer, speech, answer.ids.tolist()) for answer in answers]
    rows: list[list[tuple[Ints, Floats, float, Floats, Halves]]] = [[] for _ in prompts]
    belief = Softmax(slm.info.vocab)

    def forced(index: int, step: Step) -> int | None:
        assert step.hidden is not None
        belief.load(step.logits)
        hidden = np.array(step.hidden, np.float16)
        warm = warmed(step.logits, belief.likeliest)
        rows[index].append((*_likeliest(step, belief), belief.entropy(), warm, hidden))
        at = len(rows[index])
        return targets[index][at - 1] if at < len(targets[index]) else None

    drive(slm, [encode_chat(slm.tokenizer, prompt.messages) for prompt in prompts], prompts, forced)
    found = []
    for target, row in zip(targets, rows, strict=True):
        tops, shares, entropy, warm, hidden = zip(*row, strict=True)
        lengths = [len(slm.tokenizer.piece(token)) for token in target]
        found.append(
            Followed(
                np.array(target, np.int32),
                np.cumsum([0, *lengths[:-1]]).astype(np.int32),
                np.stack(tops),
                np.stack(shares),
                np.array(entropy, np.float32),
                np.stack(warm),
                np.stack(hidden),
            )
        )
    return found


def _likeliest(step: Step, belief: Softmax) -> tuple[Ints, Floats]:
    ids = top_ids(step.logits, TOP)
    return ids.astype(np.int32), np.array([belief.p(int(i)) for i in ids], np.float32)


def retold(tokenizer: Tokenizer, speech: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The LLM's answer, spoken in `speech`, in the SLM's tokens."""
    if tokenizer.fingerprint == speech.fingerprint:
        return list(ids)
    tokens = tokenizer.encode(speech.decode(ids))
    if ids[-1] in speech.eog:
        return [*tokens, tokenizer.end_id]
    # The answer was cut: its last SLM token might have come out longer.
    return tokens if len(tokens) == 1 else tokens[:-1]
