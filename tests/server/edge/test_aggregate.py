"""Aggregation against Flower's, and against devices that lie."""

from __future__ import annotations

import json
import subprocess
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.edge.aggregate import CAP, TRIM, Floats, Method, aggregate, capped, discount, weigh
from tests.brokers import ROOT

_FLOWER = """
import json, sys
import numpy as np
from flwr.server.strategy.aggregate import aggregate, aggregate_median, aggregate_trimmed_avg
found = []
for case in json.load(sys.stdin):
    results = [([np.array(row)], weight) for row, weight in zip(case["values"], case["weights"])]
    found.append({
        "mean": aggregate(results)[0].tolist(),
        "median": aggregate_median(results)[0].tolist(),
        "trimmed": aggregate_trimmed_avg(results, case["trim"])[0].tolist(),
    })
json.dump(found, sys.stdout)
"""
ROBUST: tuple[Method, ...] = ("median", "trimmed")


def flower(cases: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    python = ROOT / ".venv" / "flower" / "bin" / "python"
    assert python.exists(), "Flower is missing: run tests/install_flower"
    done = subprocess.run([python, "-c", _FLOWER], input=json.dumps(cases), capture_output=True, text=True, check=True)
    found: list[dict[str, list[float]]] = json.loads(done.stdout)
    return found


def test_the_results_are_those_of_flower() -> None:
    random = np.random.default_rng(1)
    cases = []
    for n in [*range(1, 12), 40, 99, 100, 1000]:
        for trim in (0.0, 0.1, 0.2, 0.25, 0.49):
            values = random.random((n, 3)) if n % 2 else random.integers(0, 4, (n, 3)) / 4  # also with ties
            cases.append({"values": values.tolist(), "weights": random.integers(1, 500, n).tolist(), "trim": trim})
    for case, theirs in zip(cases, flower(cases), strict=True):
        equal = np.full(len(case["values"]), 0.3)
        ours = {
            "mean": aggregate(case["values"], case["weights"], "mean"),
            "median": aggregate(case["values"], equal, "median"),
            "trimmed": aggregate(case["values"], equal, "trimmed", case["trim"]),
        }
        for method, result in ours.items():
            np.testing.assert_allclose(result, theirs[method], rtol=1e-12, atol=1e-15, err_msg=method)


N, LIARS = 100, 20
ATTACKS = {
    "lowest": lambda random: np.zeros(LIARS),
    "highest": lambda random: np.ones(LIARS),
    "both ends": lambda random: np.repeat([0.0, 1.0], LIARS // 2),
    "one lie": lambda random: np.full(LIARS, 0.62),
    "noise": lambda random: random.random(LIARS),
}


def honest_values(random: np.random.Generator) -> Floats:
    """Normal, and non-IID: two kinds of devices."""
    centres = np.where(np.arange(N - LIARS) % 2, 0.3, 0.4)
    values: Floats = np.clip(random.normal(centres, 0.05), 0.0, 1.0)
    return values


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("method", ROBUST)
def test_a_fifth_that_lies_stays_within_the_bound_of_the_honest(method: Method, attack: str) -> None:
    """The bound of the module's docstring, for any honest values; in these, 0.07 of the threshold's range."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        honest = np.sort(honest_values(random))
        values = np.concatenate([honest, ATTACKS[attack](random)])[:, None]
        evidence = np.concatenate([random.uniform(20, 200, N - LIARS), np.full(LIARS, 1e9)])
        with_liars = aggregate(values, weigh(evidence, np.zeros(N), method), method)[0]
        without = aggregate(honest[:, None], np.ones(N - LIARS), method)[0]
        k = int(TRIM * N) if method == "trimmed" else N // 2 - 1
        low, high = honest[k - LIARS : N - k - LIARS].mean(), honest[k : N - k].mean()
        assert low - 1e-12 <= with_liars <= high + 1e-12
        assert low - 1e-12 <= without <= high + 1e-12
        assert abs(with_liars - without) <= high - low
        assert abs(with_liars - without) <= 0.07


def test_the_distance_for_normal_values_is_as_stated() -> None:
    normal = NormalDist()
    honest = np.array([normal.inv_cdf((rank + 0.5) / 80_000) for rank in range(80_000)])
    for method, stated in (("median", 0.32), ("trimmed", 0.37)):
        values = np.concatenate([honest, np.full(20_000, 100.0)])[:, None]
        assert abs(aggregate(values, np.ones(100_000), method)[0]) == pytest.approx(stated, abs=0.01)


def test_the_weighted_mean_has_no_such_bound() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([np.full(80, 0.35), np.ones(20)])[:, None]
    evidence = np.concatenate([random.uniform(90, 110, 80), np.full(20, 1e9)])
    moved = aggregate(values, weigh(evidence, np.zeros(N), "mean"), "mean")[0]
    assert moved > 0.35 + 0.25
    assert moved < 0.35 + 0.65 * 0.55  # the cap holds what a claim can weigh, not what a minority can


def test_evidence_is_capped_and_one_claim_does_not_decide() -> None:
    assert capped([10, 10, 10, 1e9]).tolist() == [10, 10, 10, CAP * 10]
    assert capped([10, 1e9]).tolist() == [10, CAP * 10]  # of two, the larger claim sets no cap
    assert capped([7]).tolist() == [7]
    weights = weigh([10, 10, 10, 1e9], [0, 0, 0, 0], "mean")
    assert aggregate([[0.2], [0.2], [0.2], [1.0]], weights, "mean")[0] == pytest.approx((0.6 + 4) / 7)


def test_robust_methods_ignore_claims() -> None:
    for method in ROBUST:
        assert weigh([1, 5, 1e9], [0, 0, 0], method).tolist() == [1, 1, 1]


def test_late_updates_count_for_less() -> None:
    assert discount([0, 1, 3, 99]).tolist() == pytest.approx([1, 2**-0.5, 0.5, 0.1])
    for method in ("mean", *ROBUST):
        weights = weigh([10, 10], [0, 3], method)
        assert weights[1] == pytest.approx(weights[0] / 2)
    on_time_and_late = weigh([10] * 4, [0, 0, 3, 3], "trimmed")
    assert aggregate([[0.2], [0.2], [0.8], [0.8]], on_time_and_late, "trimmed", 0.0)[0] == pytest.approx(0.4)
    # half of the weight is on either side of a weighted median
    assert aggregate([[0.1], [0.2], [0.3], [0.9]], [0.5, 0.5, 0.5, 0.75], "median")[0] == 0.3


def test_honest_devices_that_are_late_make_no_room_for_liars() -> None:
    for lag in (1, 8, 100):
        values = [*np.linspace(0.3, 0.4, 80), *np.ones(20)]
        weights = weigh(np.ones(100), [lag] * 80 + [0] * 20, "trimmed")
        assert 0.3 < aggregate(np.array(values)[:, None], weights, "trimmed")[0] < 0.4


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, Floats]:
    n, p = draw(st.integers(1, 30)), draw(st.integers(1, 3))
    values = draw(st.lists(st.floats(0, 1), min_size=n * p, max_size=n * p))
    weights = draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 8.0]), min_size=n, max_size=n))
    return np.array(values).reshape(n, p), np.array(weights)


@given(cases(), st.sampled_from(["mean", "median", "trimmed"]), st.floats(0, 0.49), st.randoms())
def test_every_aggregate_lies_among_the_values_whatever_the_order(
    case: tuple[Floats, Floats], method: Method, trim: float, random: Any
) -> None:
    values, weights = case
    result = aggregate(values, weights, method, trim)
    assert (result >= values.min(axis=0) - 1e-12).all()
    assert (result <= values.max(axis=0) + 1e-12).all()
    order = list(range(len(weights)))
    random.shuffle(order)
    np.testing.assert_allclose(aggregate(values[order], weights[order], method, trim), result, atol=1e-9)


@pytest.mark.parametrize(
    ("values", "weights", "trim"),
    [
        ([[0.1]], [0.0], 0.1),
        ([[0.1]], [-1.0], 0.1),
        ([[0.1], [0.2]], [1.0, 0.0], 0.1),
        ([[0.1]], [1.0, 1.0], 0.1),
        ([0.1], [1.0], 0.1),
        ([[0.1]], [1], 0.5),
    ],
)
def test_nonsense_is_an_error(values: Any, weights: Any, trim: float) -> None:
    with pytest.raises(ValueError):
        aggregate(values, weights, "trimmed", trim)
