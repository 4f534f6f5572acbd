"""Recordings: the LLM's greedy answers, and what the SLM sees at each step when it is led along them.

Model passes are slow and never change, so each prompt's answer and each prompt's steps are a file in the cache, named
by a hash of everything that went into it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.uncertainty import Softmax
from models.chat import encode_chat
from models.engine.base import Engine, Step
from models.sampling import top_ids
from tools.eval.recordings import BATCH, Progress, drive
from tools.eval.tasks import Prompt

TOP = 64  # tokens of x that are kept
RECENT = 8  # tokens before a step that are kept
_RECIPE = 1  # raised when a recording would come out differently


class Answer(msgspec.Struct, frozen=True):
    """What the LLM wrote, greedily: token ids, their bytes and probabilities. `ended`: the last one ends the answer."""

    ids: list[int]
    pieces: list[bytes]
    p: list[float]
    ended: bool


@dataclass(frozen=True, slots=True)
class Steps:
    """n steps of the SLM along one answer. `target`: the LLM's token in the SLM's vocabulary; `target_p`: what the LLM
    gave it; `target_x`: what the SLM gave it. `recent`: the tokens before each step, the newest last."""

    hidden: NDArray[np.float16]  # (n, d)
    top_ids: NDArray[np.int32]  # (n, TOP)
    top_x: NDArray[np.float32]  # (n, TOP)
    u: NDArray[np.float32]  # (n,)
    target: NDArray[np.int32]  # (n,)
    target_p: NDArray[np.float32]  # (n,)
    target_x: NDArray[np.float32]  # (n,)
    recent: NDArray[np.int32]  # (n, RECENT)

    @property
    def draft(self) -> NDArray[np.int32]:
        return self.top_ids[:, 0]


def answers(
    engine: Callable[[], Engine], model: str, prompts: Sequence[Prompt], cache: Path, say: Progress
) -> list[Answer]:
    """The LLM's answer to each prompt. `engine` is called only if something is missing; `model` is its fingerprint."""
    paths = [cache / "answers" / f"{_key(model, prompt)}.msgpack" for prompt in prompts]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if missing:
        llm = engine()
        for at in range(0, len(missing), BATCH):
            wave = missing[at : at + BATCH]
            for index, answer in zip(wave, _write(llm, [prompts[i] for i in wave]), strict=True):
                _save(paths[index], msgspec.msgpack.encode(answer))
            say(f"answers {at + len(wave)}/{len(missing)}")
        llm.close()
    return [msgspec.msgpack.decode(path.read_bytes(), type=Answer) for path in paths]


def _write(llm: Engine, prompts: Sequence[Prompt]) -> list[Answer]:
    ids: list[list[int]] = [[] for _ in prompts]
    p: list[list[float]] = [[] for _ in prompts]
    softmax = Softmax(llm.info.vocab)

    def greedy(index: int, step: Step) -> int | None:
        belief = softmax.load(step.logits)
        ids[index].append(belief.likeliest)
        p[index].append(belief.p(belief.likeliest))
        ends = belief.likeliest in llm.tokenizer.eog or len(ids[index]) >= prompts[index].max_tokens
        return None if ends else belief.likeliest

    drive(llm, [encode_chat(llm.tokenizer, prompt.messages) for prompt in prompts], prompts, greedy)
    piece, eog = llm.tokenizer.piece, llm.tokenizer.eog
    return [Answer(i, [piece(t) for t in i], q, i[-1] in eog) for i, q in zip(ids, p, strict=True)]


def steps(
    engine: Callable[[], Engine],
    model: str,
    llm: str,
    prompts: Sequence[Prompt],
    written: Sequence[Answer],
    cache: Path,
    say: Progress,
) -> list[Steps]:
    """The SLM's steps along each answer."""
    paths = [cache / "steps" / f"{_key(model, prompt, llm)}.npz" for prompt in prompts]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if missing:
        slm = engine()
        for at in range(0, len(missing), BATCH):
            wave = missing[at : at + BATCH]
            _follow(slm, [prompts[i] for i in wave], [written[i] for i in wave], [paths[i] for i in wave])
            say(f"steps {at + len(wave)}/{len(missing)}")
        slm.close()
    return [_load(path) for path in paths]


def _follow(slm: Engine, prompts: Sequence[Prompt], written: Sequence[Answer], paths: Sequence[Path]) -> None:
    targets = [_targets(slm, answer) for answer in written]
    starts = [encode_chat(slm.tokenizer, prompt.messages) for prompt in prompts]
    rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
    softmax = Softmax(slm.info.vocab)

    def forced(index: int, step: Step) -> int | None:
        at = len(rows[index])
        token, p = targets[index][at]
        belief = softmax.load(step.logits)
        ids = top_ids(step.logits, TOP)
        before = (starts[index] + [t for t, _ in targets[index][:at]])[-RECENT:]
        rows[index].append(
            {
                "hidden": np.asarray(step.hidden, np.float16),
                "top_ids": ids.astype(np.int32),
                "top_x": np.array([belief.p(int(i)) for i in ids], np.float32),
                "u": np.float32(belief.entropy()),
                "target": np.int32(token),
                "target_p": np.float32(p),
                "target_x": np.float32(belief.p(token)),
                "recent": np.array(before, np.int32),
            }
        )
        return token if at + 1 < len(targets[index]) else None

    drive(slm, starts, prompts, forced)
    for path, row in zip(paths, rows, strict=True):
        columns = {name: np.stack([r[name] for r in row]) for name in row[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{os.getpid()}")
        with whole.open("wb") as file:
            np.savez(file, allow_pickle=False, **columns)
        whole.replace(path)


def _targets(slm: Engine, answer: Answer) -> list[tuple[int, float]]:
    """The LLM's answer in the SLM's tokens, each with the LLM's probability of its own token at that byte."""
    text = b"".join(answer.pieces)
    tokens = slm.tokenizer.encode(text)
    ends = np.cumsum([len(piece) for piece in answer.pieces])
    found, at = [], 0
    for token in tokens:
        where = int(np.searchsorted(ends, at, side="right"))
        found.append((token, answer.p[min(where, len(answer.p) - 1)]))
        at += len(slm.tokenizer.piece(token))
    if answer.ended:
        return [*found, (slm.tokenizer.end_id, answer.p[-1])]
    # The answer was cut: its last SLM token might have come out longer.
    return found if len(found) == 1 else found[:-1]


def _key(model: str, prompt: Prompt, *more: str) -> str:
    messages = [[message.role, message.content] for message in prompt.messages]
    whole = msgspec.json.encode([_RECIPE, model, *more, messages, prompt.max_tokens])
    return hashlib.sha256(whole).hexdigest()[:32]


def _save(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_bytes(content)
    whole.replace(path)


def _load(path: Path) -> Steps:
    with np.load(path, allow_pickle=False) as columns:
        return Steps(**{name: columns[name] for name in Steps.__dataclass_fields__})
