"""The evaluation's arithmetic, on steps whose figures can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from agent.memory.key import KEY_BYTES, tail
from agent.memory.rule_evidence import Evidence
from tools.eval import measure
from tools.eval.fleet import CLOUD, LOCAL, MEMORY, Outcome, Rule, run
from tools.eval.steps import RECENT, TOP, Steps
from tools.eval.stream import DEVICES, NEW, REPEATED, REWORDED, Recorded, Text, Visit, visits
from tools.eval.tasks import Prompt

DRAFT, TARGET = 1, 2


def recordings(u: list[float], right: list[bool], keys: list[int]) -> Recorded:
    """One step per text, of as many documents. The LLM says TARGET, the draft says so where `right`; steps with the
    same number in `keys` are in the same state."""
    n = len(u)
    ids = np.tile(np.arange(10, 10 + TOP, dtype=np.int32), (n, 1))
    ids[:, 0] = [TARGET if r else DRAFT for r in right]
    ids[:, 1] = [DRAFT if r else TARGET for r in right]
    x = np.full((n, TOP), 0.001, np.float32)
    x[:, :2] = (0.5, 0.3)
    column = np.ones(n, np.float32)
    steps = Steps(
        hidden=np.zeros((n, 4), np.float16),
        top_ids=ids,
        top_x=x,
        u=np.array(u, np.float32),
        target=np.full(n, TARGET, np.int32),
        target_p=column,
        target_x=column,
        recent=np.zeros((n, RECENT), np.int32),
    )
    unit = np.eye(max(keys) + 1, KEY_BYTES, dtype=np.int8)[keys]
    texts = [Text(Prompt("topic", 0, document, (), 1), range(document, document + 1)) for document in range(n)]
    similarity = unit.astype(np.float32) @ unit.T.astype(np.float32)
    return Recorded(texts, steps, unit * np.int8(127), similarity, [tail([0] * RECENT)] * n)


def in_order(data: Recorded) -> list[Visit]:
    return [Visit(text, 0, NEW) for text in range(len(data.texts))]


def test_without_memory_the_threshold_alone_decides() -> None:
    data = recordings([0.9, 0.1, 0.5], [False, False, True], [0, 1, 2])
    outcome = run(data, in_order(data), 0.3, None)
    assert outcome.who.tolist() == [CLOUD, LOCAL, CLOUD]
    assert outcome.token.tolist() == [TARGET, DRAFT, TARGET]


def test_a_state_that_comes_back_is_answered_from_memory() -> None:
    data = recordings([0.9] * 40, [False] * 40, [0] * 40)
    outcome = run(data, in_order(data), 0.3, Rule("similarity", 0.95, gate=True))
    assert outcome.who[0] == CLOUD
    assert (outcome.who[1:] == MEMORY).sum() >= 30  # the others are audited
    assert outcome.hit[1:].all()
    figures = measure.figures(data, outcome, np.ones(40, bool), 0.3)
    assert figures["right"] == figures["right_where_different"] == figures["quality"] == 1.0
    assert figures["draft_right_there"] == 0.0
    assert figures["cloud_calls_saved"] == pytest.approx((outcome.who == MEMORY).sum() / 40)


def test_what_is_kept_local_teaches_nothing() -> None:
    data = recordings([0.1, 0.9], [False, False], [0, 0])
    assert run(data, in_order(data), 0.3, Rule("similarity", 0.5, gate=False)).who.tolist() == [LOCAL, CLOUD]


def test_learned_reuse_begins_with_audits() -> None:
    data = recordings([0.9] * 200, [False] * 200, [0] * 200)
    outcome = run(data, in_order(data), 0.3, Evidence())
    assert outcome.hit[1:].all()
    assert (outcome.who[:2] == CLOUD).all()
    assert (outcome.who[100:] == MEMORY).mean() > 0.6


def test_calls_are_compared_at_equal_quality() -> None:
    # Six steps, the draft wrong at the first four, surest last. Memory answered two of them right: quality 4 of 6 for
    # no call. The threshold needs the two most uncertain for that.
    data = recordings([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [False] * 4 + [True] * 2, list(range(6)))
    rows = np.arange(6)
    token = np.array([TARGET, TARGET, DRAFT, DRAFT, TARGET, TARGET], np.int32)
    who = np.array([MEMORY, CLOUD, LOCAL, LOCAL, LOCAL, LOCAL], np.int8)
    outcome = Outcome(rows, rows, who, token, who == MEMORY, token, 0.5)
    everything = np.ones(6, bool)
    assert measure.saved_share(data, outcome, everything) == pytest.approx(0.5)  # one call instead of two
    wasteful = Outcome(rows, rows, np.full(6, CLOUD, np.int8), token, who == MEMORY, token, 0.5)
    assert measure.saved_share(data, wasteful, everything) == pytest.approx(-2.0)  # six instead of two
    low, high = measure.interval(data, in_order(data), outcome, everything, 0)
    assert low is not None
    assert high is not None
    assert low <= 0.5 <= high


def test_each_device_comes_after_the_one_whose_questions_it_repeats() -> None:
    texts = [Text(Prompt("topic", wording, at, (), 1), range(0)) for wording in (0, 1) for at in range(40)]
    order = visits(texts, 3)
    assert visits(texts, 3) == order != visits(texts, 4)
    first: dict[int, tuple[int, int]] = {}  # document: position, device
    kinds = set()
    for position, visit in enumerate(order):
        document = texts[visit.text].prompt.document
        kinds.add(visit.kind)
        if visit.kind == NEW:
            first[document] = (position, visit.device)
        else:
            assert first[document][0] < position
            assert visit.device == (first[document][1] + 1) % DEVICES
    assert kinds == {NEW, REWORDED, REPEATED}
    assert len(first) == 40
