"""`skerry eval memory`: what the memory stage is worth on real text (docs/memory.md).

A large model's greedy answers to questions about news articles, and a small model led along them; then several devices
in a row that share a memory, under the same threshold policy with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agent.memory.key import KeyMaker, space_of
from agent.memory.rule_evidence import BOUND, Evidence
from models.engine.gguf import GgufEngine, GgufTokenizer
from models.fingerprint import fingerprint
from tools.eval import measure
from tools.eval.data import LABELS, Article, articles
from tools.eval.fleet import MEMORY, Outcome, Rule, run
from tools.eval.recordings import BATCH, Progress
from tools.eval.steps import answers, steps
from tools.eval.stream import Recorded, recorded, visits
from tools.eval.tasks import OPEN_TASKS, Prompt, prompt

SIMILARITIES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
SCORES = (0.3, 0.4, 0.5, 0.6, 0.8)
TAUS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
ORDERS = 3  # of the texts and devices
_CONTEXT = 8192  # tokens, for BATCH answers at once

Row = dict[str, Any]


def evaluate(
    slms: Sequence[Path], llm: Path, cache: Path, *, documents: int, seed: int, tau: float, threads: int, say: Progress
) -> dict[str, list[Row]]:
    """The object of `skerry eval memory --json`: tables of rows, each of which names its small model and, where it
    has one, its kind of text. Raises SourceUnreachable, HashMismatch, BadModelFile."""
    found = articles(cache, seed)[:documents]
    prompts = list(questions(found))
    model = fingerprint(llm)
    open_llm = partial(_open, llm, threads, hidden=False)
    written = answers(open_llm, model, prompts, cache, lambda line: say(f"{llm.stem}: {line}"))
    result: dict[str, list[Row]] = {}
    for slm in slms:
        prefixed = partial(_prefixed, say, slm.stem)
        open_slm = partial(_open, slm, threads, hidden=True)
        led = steps(open_slm, fingerprint(slm), model, prompts, written, cache, prefixed)
        width = led[0].hidden.shape[1]
        data = recorded(prompts, led, _key_maker(slm, cache, width, open_slm, prefixed).key)
        for table, row in _figures(data, found, slm, seed, tau, prefixed):
            result.setdefault(table, []).append({"slm": slm.stem, "llm": llm.stem, **row})
    return result


def questions(found: Sequence[Article]) -> Iterator[Prompt]:
    """Topics of all articles, of half of them in other words too; open tasks on fewer, both wordings. Ordered so that
    answers that are written at once are of different articles, and the next ones find an article in the cache."""
    for wording, count in ((0, len(found)), (1, len(found) // 2)):
        yield from (prompt("topic", wording, document, found[document]) for document in range(count))
    few = len(found) * 3 // 20
    for start in range(0, few, BATCH):
        for wording in (0, 1):
            for task in OPEN_TASKS:
                batch = range(start, min(start + BATCH, few))
                yield from (prompt(task, wording, document, found[document]) for document in batch)


def _figures(
    data: Recorded, found: Sequence[Article], slm: Path, seed: int, tau: float, say: Progress
) -> Iterator[tuple[str, Row]]:
    """(table, row), table by table."""
    orders = [visits(data.texts, seed + turn) for turn in range(ORDERS)]
    rules = [Rule("similarity", least, gate) for gate in (True, False) for least in SIMILARITIES]
    for rule in [*rules, *(Rule("score", least, gate=True) for least in SCORES)]:
        say(f"{rule.by} >= {rule.least:g}, {'with' if rule.gate else 'without'} the content gate")
        outcome = run(data, orders[0], tau, rule, seed)
        for kind, mask in measure.groups(data, orders[0], outcome):
            row = {"kind": kind, "by": rule.by, "threshold": rule.least, "gate": rule.gate}
            yield "thresholds", {**row, "tau": tau, **measure.figures(data, outcome, mask, tau)}
    for at in sorted({*TAUS, tau}):
        say(f"learned threshold, escalating above u = {at:g}")
        for turn, order in enumerate(orders):
            outcome = run(data, order, at, Evidence(BOUND), seed + turn)
            for kind, mask in measure.groups(data, order, outcome):
                row = {"kind": kind, "tau": at, "order": turn, "theta": round(outcome.theta, 4)}
                low, high = measure.interval(data, order, outcome, mask, seed) if at == tau else (None, None)
                row |= measure.figures(data, outcome, mask, at)
                yield "learned", {**row, "saved_low": low, "saved_high": high, **_alone(data, outcome, mask, at)}
            if at == tau and turn == 0:
                yield from (("devices", row) for row in measure.by_device(data, order, outcome, at))
                yield "gold", _gold(data, found, slm, outcome)


def _alone(data: Recorded, outcome: Outcome, mask: measure.Mask, tau: float) -> Row:
    """The same policy without memory."""
    rows = outcome.row[mask]
    escalated = data.steps.u[rows] > tau
    right = escalated | (data.steps.draft[rows] == data.steps.target[rows])
    return {"calls_without": round(float(escalated.mean()), 4), "quality_without": round(float(right.mean()), 4)}


def _gold(data: Recorded, found: Sequence[Article], slm: Path, outcome: Outcome) -> Row:
    """Topics against the articles' own labels: is what memory repeats also true?"""
    tokenizer = GgufTokenizer.open(slm)
    label = {text.rows.start: found[text.prompt.document].label for text in data.texts if text.prompt.task == "topic"}
    places = [at for at, row in enumerate(outcome.row.tolist()) if row in label]
    rows = [int(outcome.row[at]) for at in places]

    def right(token: int, row: int) -> bool:
        said = tokenizer.piece(token).decode("utf-8", "replace").strip().lower()
        return bool(said) and [name for name in LABELS if name.startswith(said)] == [label[row]]

    def share(tokens: Sequence[int]) -> float:
        return round(sum(right(t, row) for t, row in zip(tokens, rows, strict=True)) / len(rows), 4)

    from_memory = [at for at in places if outcome.who[at] == MEMORY]
    return {
        "questions": len(rows),
        "slm_alone_right": share(data.steps.draft[rows].tolist()),
        "with_memory_right": share(outcome.token[places].tolist()),
        "llm_right": share(data.steps.target[rows].tolist()),
        "answered_by_memory": len(from_memory),
        "memory_right_there": sum(right(int(outcome.token[at]), int(outcome.row[at])) for at in from_memory),
        "llm_right_there": sum(
            right(int(data.steps.target[outcome.row[at]]), int(outcome.row[at])) for at in from_memory
        ),
    }


def _open(path: Path, threads: int, *, hidden: bool) -> GgufEngine:
    return GgufEngine(path, context=_CONTEXT, sequences=BATCH, threads=threads, hidden=hidden)


def _key_maker(slm: Path, cache: Path, width: int, open_slm: Callable[[], GgufEngine], say: Progress) -> KeyMaker:
    model = fingerprint(slm)
    path, space = cache / "keys" / model[:32], space_of(model)
    kept = KeyMaker.load(path, space, width)
    if kept is None:
        say("reading the calibration text")
        engine = open_slm()
        kept = KeyMaker.calibrate(engine)
        engine.close()
        kept.save(path)
    return kept


def _prefixed(say: Progress, name: str, line: str) -> None:
    say(f"{name}: {line}")
