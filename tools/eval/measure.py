"""Figures from a run: what the hits were worth, and what they saved at equal quality.

Quality is the share of tokens that are the LLM's. Without memory, the best that a threshold on u can do with c calls
is to escalate the c most uncertain steps; a run with memory is compared with that, at the quality which it reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.memory.key import KEY_BYTES
from protocol.memory import ORIGIN_BYTES, SIGNATURE_BYTES, SPACE_BYTES, TAIL_BYTES, Entry
from protocol.peers import Ask, News, encode
from tools.eval.fleet import CLOUD, MEMORY, Outcome
from tools.eval.stream import DEVICES, Recorded, Visit

Mask = NDArray[np.bool_]

_RESAMPLES = 400
_INTERVAL = (5, 95)  # percentiles


def groups(data: Recorded, order: Sequence[Visit], outcome: Outcome) -> Iterator[tuple[str, Mask]]:
    """All steps, then those of each kind of text."""
    kinds = np.array([f"{_task(data, visit)}, {visit.kind}" for visit in order])[outcome.visit]
    yield "all", np.ones(len(kinds), bool)
    for kind in sorted(set(kinds.tolist())):
        yield kind, kinds == kind


def _task(data: Recorded, visit: Visit) -> str:
    return "topic" if data.texts[visit.text].prompt.task == "topic" else "open"


def figures(data: Recorded, outcome: Outcome, mask: Mask, tau: float) -> dict[str, Any]:
    """The row of one rule on one kind of text. Shares, but for `hits`. None: there is nothing to count."""
    rows, hit = outcome.row[mask], outcome.hit[mask]
    target, draft, candidate = data.steps.target[rows], data.steps.draft[rows], outcome.candidate[mask]
    right, different = candidate == target, hit & (candidate != draft)
    asked, calls = data.steps.u[rows] > tau, outcome.who[mask] == CLOUD
    saved = int(asked.sum() - calls.sum())
    entry, question = sizes()
    return {
        "hits": int(hit.sum()),
        "right": _share(right[hit]),
        "wrong_reuse_rate": _share(~right[hit]),
        "different": int(different.sum()),
        "right_where_different": _share(right[different]),
        "draft_right_there": _share((draft == target)[different]),
        "calls": _share(calls),
        "cloud_calls_saved": round(saved / max(1, int(asked.sum())), 4),
        "quality": _share(outcome.token[mask] == target),
        "saved_at_equal_quality": _rounded(saved_share(data, outcome, mask)),
        "gossip_bytes_per_saved_call": round(calls.sum() * entry * DEVICES / saved) if saved else None,
        "query_bytes_per_saved_call": round(calls.sum() * question * DEVICES / saved) if saved else None,
    }


def saved_share(data: Recorded, outcome: Outcome, mask: Mask, weight: NDArray[np.int_] | None = None) -> float | None:
    """The share of calls that memory saved against a threshold on u which reaches the same quality; None if that
    needs no calls at all. `weight` (steps in mask,): how often each step counts."""
    rows = outcome.row[mask]
    w = np.ones(len(rows), np.int_) if weight is None else weight
    target = data.steps.target[rows]
    reached = float(w @ (outcome.token[mask] == target))
    calls = float(w @ (outcome.who[mask] == CLOUD))
    order = np.argsort(-data.steps.u[rows], kind="stable")
    draft_right = data.steps.draft[rows] == target
    right = np.concatenate([[0], np.cumsum((w * ~draft_right)[order])]) + float(w @ draft_right)
    spent = np.concatenate([[0], np.cumsum(w[order])])
    without = float(spent[np.searchsorted(right, reached - 1e-9)])
    return 1.0 - calls / without if without else None


def interval(data: Recorded, order: Sequence[Visit], outcome: Outcome, mask: Mask, seed: int) -> list[float | None]:
    """90 % bootstrap interval of `saved_share`, over documents."""
    documents = np.array([data.texts[visit.text].prompt.document for visit in order])[outcome.visit][mask]
    names, which = np.unique(documents, return_inverse=True)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_RESAMPLES):
        drawn = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        found.append(saved_share(data, outcome, mask, drawn[which]))
    shares = [share for share in found if share is not None]
    return [_rounded(float(value)) for value in np.percentile(shares, _INTERVAL)] if shares else [None, None]


def by_device(data: Recorded, order: Sequence[Visit], outcome: Outcome, tau: float) -> Iterator[dict[str, Any]]:
    """New questions alone: what each device got from those before it."""
    device = np.array([visit.device for visit in order])[outcome.visit]
    new = np.array([visit.kind == "new" for visit in order])[outcome.visit]
    topic = np.array([_task(data, visit) == "topic" for visit in order])[outcome.visit]
    for number in range(DEVICES):
        for task, of_task in (("topic", topic), ("open", ~topic)):
            asked = (device == number) & new & of_task & (data.steps.u[outcome.row] > tau)
            used = asked & (outcome.who == MEMORY)
            right = outcome.token == data.steps.target[outcome.row]
            yield {
                "device": number + 1,
                "task": task,
                "escalated": int(asked.sum()),
                "answered_by_memory": _share(used[asked]),
                "right": _share(right[used]),
            }


def sizes() -> tuple[int, int]:
    """Bytes of an entry as it is published, and of a question to peers."""
    key = bytes(KEY_BYTES)
    space, end = bytes(SPACE_BYTES), bytes(TAIL_BYTES)
    entry = Entry(space, key, end, 40_000, 0.5, 1, 1 << 31, bytes(ORIGIN_BYTES), bytes(SIGNATURE_BYTES))
    return len(encode(News([entry]))), len(encode(Ask(1 << 63, space, key, end, 0.5)))


def _share(values: NDArray[Any]) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
