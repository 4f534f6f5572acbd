"""`skerry eval fusion` at its smallest: what is asked of whom, and what the figures mean."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import ConfigError
from tools.eval.fusion import ARMS, Arm, Followed, _surprises, evaluate, f1
from tools.eval.notes import KINDS, cases, informed, public
from tools.eval.recordings import Model


def test_questions_are_drawn_by_the_seed() -> None:
    assert cases(4, 1) == cases(4, 1) != cases(4, 2)
    assert [case.kind for case in cases(3, 0)] == list(KINDS) * 3
    assert cases(8, 0)[:12] == cases(4, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_cloud_is_told_nothing_of_the_note(seed: int) -> None:
    for case in cases(8, seed):
        told = " ".join(message.content for message in public(case))
        assert case.note in informed(case)[0].content
        assert case.expected in case.reference
        if case.kind != "general":
            assert case.expected.lower() not in told.lower()
        if case.kind == "private":
            assert case.expected in case.note


def test_what_a_reference_costs_under_each_rule() -> None:
    def column(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.array(values, np.float32)

    led = Followed(
        x=column(0.5, 0.9), y=column(0.1, 0.3), informed=column(0.8, 0.7),
        x_max=column(0.6, 0.9), y_max=column(0.2, 0.3), u=column(0.4, 0.01),
    )  # fmt: skip

    def cost(arm: Arm) -> list[float]:
        return [math.exp(-value) for value in _surprises(arm, led, tau=0.05)]

    assert cost(Arm("", "slm")) == pytest.approx([0.5, 0.9])
    assert cost(Arm("", "llm")) == pytest.approx([0.1, 0.3])
    assert cost(Arm("", "informed")) == pytest.approx([0.8, 0.7])
    assert cost(Arm("", "both", "take")) == cost(Arm("", "both", "verify")) == pytest.approx([0.1, 0.9])
    assert cost(Arm("", "both", "fuse", 0.25)) == pytest.approx([0.2, 0.9])
    assert cost(Arm("", "both", "fuse", "adaptive")) == pytest.approx([0.4, 0.9])


def test_agreement_is_of_words() -> None:
    assert f1("The code is 7.", "the CODE is 7") == 1.0
    assert f1("It is 7", "No.") == 0.0
    assert f1("a b", "b c d") == pytest.approx(0.4)


def test_all_arms_are_measured_and_recorded(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def run(tau: float = 0.1) -> dict[str, object]:
        options = {"notes": 1, "tau": tau, "seed": 0, "threads": 1, "most": 3}
        return evaluate(smollm2, smollm2, tmp_path, say=told.append, **options)  # type: ignore[arg-type]

    result = run()
    rows = {(row["arm"], row["kind"]): row for row in result["arms"]}  # type: ignore[attr-defined]
    assert rows.keys() == {(arm.name, kind) for arm in ARMS for kind in ("all", *KINDS)}
    assert rows["slm with the note", "all"]["asked"] == 0.0
    assert rows["llm without", "all"]["asked"] == 1.0
    assert rows["llm with the note", "all"]["agreement"] == 1.0
    # The same model on both sides: what it writes with the note does not depend on who runs it.
    with_note = rows["llm with the note", "all"]["nll"]
    assert rows["slm with the note", "all"]["nll"] == pytest.approx(with_note, abs=0.05)
    assert rows["slm with the note", "private"]["nll"] < rows["llm without", "private"]["nll"]
    assert all(0.0 < rows[arm.name, "all"]["asked"] < 1.0 for arm in ARMS if arm.who == "both")

    monkeypatch.setattr(Model, "engine", property(lambda model: pytest.fail("the recordings were not used")))
    assert run() == result


def test_two_tokenizers_are_refused(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = iter(("one", "other"))
    monkeypatch.setattr("models.engine.gguf.GgufTokenizer.fingerprint", property(lambda tokenizer: next(prints)))
    with pytest.raises(ConfigError, match="one tokenizer"):
        evaluate(smollm2, smollm2, tmp_path, notes=1, tau=0.1, seed=0, threads=1, say=lambda line: None)
