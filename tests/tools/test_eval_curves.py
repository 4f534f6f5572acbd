"""Points, areas and intervals of the arms, on figures that can be worked out by hand, and the claims' verdicts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.recorded_steps import decisions
from tools.eval.arms import Arm, Played, arms, run
from tools.eval.compare import compare
from tools.eval.curves import Bench, Estimate, area, least_share
from tools.eval.fleets import Fleet, Pool, fleet, pool
from tools.eval.report import draw, quality_at, tables


def one(value: float) -> Estimate:
    return Estimate(np.array([value, value]))


def test_the_area_begins_with_the_slm_and_ends_with_the_llm() -> None:
    share, quality = np.array([[0.5, 0.25]] * 2), np.array([[0.9, 0.8]] * 2)  # in any order
    found = area(share, quality, one(0.6), one(1.0))
    assert found.value == pytest.approx(0.25 * 0.7 + 0.25 * 0.85 + 0.5 * 0.95)
    assert area(np.zeros((2, 1)), np.full((2, 1), 0.6), one(0.6), one(1.0)).value == pytest.approx(0.8)


def test_the_least_share_is_where_the_line_first_reaches_what_is_wanted() -> None:
    share, quality = np.array([0.8, 0.4]), np.array([0.9, 0.8])
    assert least_share(share, quality, 0.6, 0.85, 0.85) == pytest.approx(0.6)
    assert least_share(share, quality, 0.6, 0.85, 0.6) == 0.0
    assert least_share(share, quality, 0.6, 0.85, 0.7) == pytest.approx(0.2)
    assert least_share(share, quality, 0.6, 0.85, 0.95) is None


@pytest.fixture
def four() -> tuple[Pool, Fleet]:
    """Four fresh steps of four documents; the draft is wrong at the most and at the least uncertain."""
    data = decisions(4)
    differs = np.array([True, False, False, True])
    data = dataclasses.replace(
        data,
        u=np.array([0.9, 0.7, 0.5, 0.3], np.float32),
        beta=np.array([1.0, 0.2, 0.2, 0.6], np.float32),
        differs=differs,
        slm_right=~differs,
        llm_right=np.array([True, True, False, True]),
    )
    nobody = np.empty(0, np.intp)
    drawn = Fleet(np.zeros(4, np.intp), [nobody], np.arange(4), np.zeros(1, np.intp), np.zeros(1, np.intp))
    return pool([data]), drawn


def played(asked: list[float], steps: Pool, audit: float = 0.0) -> Played:
    data, nothing = steps.data, np.zeros(len(asked), bool)
    return Played(np.array(asked), audit, data.slm_right, ~data.differs, nothing, {}, {}, nothing[None][:0])


def test_figures_of_a_run(four: tuple[Pool, Fleet]) -> None:
    steps, drawn = four
    bench = Bench(steps, [drawn], replicates=50)
    assert (bench.slm.value, bench.llm.value) == (0.5, 0.75)
    prices = Arm("x", "x", "price", (0.5,), make=None)
    curve = bench.curve(prices, [[played([0, 0, 0, 1], steps)]])
    assert (curve.share[0, 0], curve.quality[0, 0]) == (0.25, 0.75)
    # The static threshold sends the first step for that share, and gains as much.
    assert curve.points.lift[0, 0, 0] == pytest.approx(0.0)
    # Kept beta 1.4, and a price of 0.5 paid once; best is to send the first only: 1.0 + 0.5.
    assert bench.regret(curve)[0, 0] == pytest.approx((1.9 - 1.5) / 4)
    wrong = bench.curve(prices, [[played([0, 0, 1, 0], steps)]])
    assert wrong.quality[0, 0] == 0.25
    assert wrong.points.lift[0, 0, 0] == pytest.approx(-0.5)
    audited = bench.curve(prices, [[played([1, 0, 0, 0], steps, audit=0.2)]])
    assert audited.share[0, 0] == pytest.approx((1 + 3 * 0.2) / 4)
    assert audited.quality[0, 0] == pytest.approx((1 + 1 + (0.8 * 1 + 0.2 * 0) + 0.2) / 4)
    # All thresholds: shares 0, 1/4, ..., 1 with qualities 2, 3, 3, 2, 3 of 4.
    assert bench.static_area(steps.data.u).value == pytest.approx((2.5 + 3 + 2.5 + 2.5) / 4 / 4)


def test_thresholds_cannot_tell_equal_steps_apart(four: tuple[Pool, Fleet]) -> None:
    steps, drawn = four
    level = pool([dataclasses.replace(steps.data, u=np.full(4, 0.5, np.float32))])
    assert Bench(level, [drawn], replicates=5).static_area(level.data.u).value == pytest.approx((0.5 + 0.75) / 2)


def test_intervals_hold_the_truth_and_shrink_with_more_documents() -> None:
    widths = []
    for count in (200, 3200):
        steps = pool([decisions(count)])
        fleets = [fleet(steps, 5, 1.0, seed) for seed in range(3)]
        low, high = Bench(steps, fleets).slm.interval
        assert low < 1 - 0.9 * 0.375 < high  # u has a mean of 1.5 / 4
        widths.append(high - low)
    assert widths[1] < widths[0] / 2.5


def test_differences_are_paired() -> None:
    steps = pool([decisions(400)])
    fleets = [fleet(steps, 5, 1.0, seed) for seed in range(3)]
    bench = Bench(steps, fleets)
    random = next(arm for arm in arms(steps) if arm.name == "random")
    curve = bench.curve(random, [[run(random, steps, f, 0.1, 0)] for f in fleets])
    low, high = (Estimate(curve.quality[:, 0]) - Estimate(curve.quality[:, 0])).interval
    assert low == high == 0.0
    wide, paired = Estimate(curve.quality[:, 0]).interval, (Estimate(curve.quality[:, 0]) - bench.slm).interval
    assert paired[1] - paired[0] < wide[1] - wide[0]


@pytest.fixture(scope="module")
def apart() -> dict[str, Any]:
    """Devices whose labels decide how often the LLM differs: each needs a threshold of its own."""
    return compare(pool([decisions(120, steps=60, labels=2, by_label=0.4)]), devices=6, alpha=0.1, seeds=2)


@pytest.fixture(scope="module")
def alike() -> dict[str, Any]:
    return compare(pool([decisions(120, steps=60)]), devices=6, alpha=100.0, seeds=2)


def test_every_arm_has_points_and_an_area(apart: dict[str, Any]) -> None:
    assert {"slm_only", "llm_only", "random", "static", "local", "federated", "centralised"} <= apart["arms"].keys()
    for arm in apart["arms"].values():
        assert 0 < arm["auc"] < 1
        for point in arm["points"]:
            low, high = point["ci"]
            assert 0 <= low <= point["quality"] <= high <= 1
            assert 0 <= point["llm_share"] <= 1
            assert point["bytes_total"] == sum(point["bytes"].values())
            tokens = sum(point["tokens"].values())
            assert tokens == pytest.approx(apart["data"]["fresh_steps"], abs=2)
    assert apart["arms"]["oracle"]["auc"] > apart["arms"]["static"]["auc"] > apart["arms"]["random"]["auc"]
    assert json.loads(json.dumps(apart)) == apart


def test_one_threshold_for_all_is_on_the_static_curve_but_for_its_audits(apart: dict[str, Any]) -> None:
    claim = apart["claims"]["federated_reaches_static"]
    assert claim["flat_without_its_audits"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert -0.005 < claim["flat"]["value"] < 0.0
    assert claim["holds"] is (claim["flat"]["ci"][1] >= 0.0)


def test_personal_thresholds_win_where_devices_differ_and_not_where_they_do_not(
    apart: dict[str, Any], alike: dict[str, Any]
) -> None:
    assert apart["claims"]["personal_beats_global"]["holds"] is True
    assert apart["claims"]["personal_beats_global"]["clusters"]["value"] > 0.002
    assert alike["claims"]["personal_beats_global"]["holds"] is not True
    assert alike["claims"]["head_beats_scalar"]["holds"] is not True


def test_regret_falls_with_the_rounds(alike: dict[str, Any]) -> None:
    claim = alike["claims"]["federated_beats_alone"]
    for name in ("federated_clusters", "centralised"):
        assert claim["regret_by_round"][name][-1] < claim["regret_by_round"][name][0] + 0.002
        assert claim["regret_by_round"][name][-1] < 0.03
    assert alike["arms"]["federated"]["rounds_to_converge"] >= 1
    assert alike["arms"]["static"]["rounds_to_converge"] is None


def test_a_comparison_is_the_same_each_time() -> None:
    once, again, other = (
        compare(pool([decisions(48)]), devices=3, alpha=1.0, seeds=1, first_seed=seed) for seed in (0, 0, 1)
    )
    assert once == again != other


def test_tables_say_what_holds(apart: dict[str, Any], tmp_path: Path) -> None:
    result = {**apart, "pairs": [apart]}
    shown = tables(result)
    assert "federated, flat" in shown
    assert "holds: personal thresholds are better than one for all" in shown
    random = quality_at(apart["arms"]["random"], apart["data"], 0.37)
    slm, llm = (apart["data"][name]["value"] for name in ("slm_only", "llm_only"))
    assert random == pytest.approx(slm + 0.37 * (llm - slm), abs=1e-3)
    draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
