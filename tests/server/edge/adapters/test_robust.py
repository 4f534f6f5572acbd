"""What hostile and broken uploads can do, and what they are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import Adapter, Factors
from protocol.errors import BadAdapter
from server.edge.adapters import Contribution, aggregate, screen
from server.edge.adapters.delta import norm
from server.edge.adapters.robust import CLIP, FAR, MOST_SHARE
from tests.server.edge.adapters.samples import LARGER, MODEL, SHAPES, adapter, contributions, flat, like, times
from tests.server.edge.adapters.test_strategies import frozen_a

HONEST, HOSTILE = 16, 4


@pytest.fixture(scope="module")
def common() -> Adapter:
    return adapter(np.random.default_rng(0), 8, shapes=LARGER)


@pytest.fixture(scope="module")
def honest(common: Adapter) -> list[Adapter]:
    """They agree as devices with one task do: cosines of about 0.5."""
    random = np.random.default_rng(1)
    return [like(random, common, 0.6, rank=4 + 4 * (at % 2)) for at in range(HONEST)]


def checked(told: list[Contribution], strategy: str = "flexlora") -> tuple[list[Contribution], dict[str, str]]:
    return screen(told, MODEL, "llama", strategy)


def whole(told: list[Contribution]) -> np.ndarray:
    return flat(aggregate(told, "flexlora", [96], 16.0)[96])


def hostile(kind: str, by: float, honest: list[Adapter]) -> list[Adapter]:
    random = np.random.default_rng(2)
    if kind == "flipped":
        return [times(each, -by) for each in honest[:HOSTILE]]
    if kind == "random":
        return [times(adapter(random, 8, shapes=LARGER), by) for _ in range(HOSTILE)]
    return [times(adapter(random, 8, shapes=LARGER), by)] * HOSTILE


@pytest.mark.parametrize("claim", [1.0, 1000.0])
@pytest.mark.parametrize("by", [1.0, 5.0, 100.0])
@pytest.mark.parametrize("kind", ["flipped", "random", "same"])
def test_a_fifth_that_lies_moves_the_aggregate_no_further_than_stated(
    kind: str, by: float, claim: float, honest: list[Adapter]
) -> None:
    liars = contributions(hostile(kind, by, honest), claim, "liar")
    told = contributions(honest) + liars
    accepted, refused = checked(told)
    assert not any(device.startswith("device") for device in refused)
    sound = [each for each in accepted if each.device.startswith("device")]
    expected = whole(sound)
    moved = float(np.linalg.norm(whole(accepted) - expected))

    weights = sum(each.weight for each in accepted)
    share = sum(each.weight for each in accepted if each.device.startswith("liar")) / weights
    assert share <= MOST_SHARE + 1e-9
    middle = sorted(norm(each.load()) for each in told if each.device not in refused)[(len(accepted) - 1) // 2]
    length = float(np.linalg.norm(expected))
    assert moved <= share * (CLIP * middle + length) + 1e-3 * length
    assert moved < length  # it still points the right way, whatever they do

    if by * claim > 1.0:  # without screening it does not stay there
        assert np.linalg.norm(whole(told) - whole(contributions(honest))) > max(1.2 * moved, 0.4 * length)


@pytest.mark.parametrize("by", [1.0, 5.0, 100.0])
def test_flipped_signs_are_found(by: float, honest: list[Adapter]) -> None:
    told = contributions(honest) + contributions(hostile("flipped", by, honest), 1.0, "liar")
    accepted, refused = checked(told)
    assert sorted(refused) == [f"liar-{at:03}" for at in range(HOSTILE)]
    np.testing.assert_allclose(whole(accepted), whole(contributions(honest)), atol=1e-3)


def test_sound_uploads_pass_as_they_are(honest: list[Adapter]) -> None:
    told = contributions(honest, list(range(1, HONEST + 1)))
    accepted, refused = checked(told)
    assert not refused
    assert [each.device for each in accepted] == [each.device for each in told]
    assert all(one.load() is other.load() for one, other in zip(accepted, told, strict=True))


def test_if_more_than_a_quarter_are_opposed_nobody_is_left_out_for_it(honest: list[Adapter]) -> None:
    told = contributions(honest[:8]) + contributions([times(each, -1.0) for each in honest[8:14]], 1.0, "other")
    assert not checked(told)[1]


def test_larger_changes_are_clipped_and_absurd_ones_refused(honest: list[Adapter]) -> None:
    middle = sorted(norm(each) for each in honest)[HONEST // 2]
    told = contributions([*honest, times(honest[0], 4.0), times(honest[1], 2 * FAR)])
    accepted, refused = checked(told)
    assert list(refused) == ["device-017"]
    assert "median" in refused["device-017"]
    clipped = accepted[-1].load()
    assert norm(clipped) == pytest.approx(CLIP * middle, rel=0.1)
    np.testing.assert_allclose(flat(clipped) / norm(clipped), flat(honest[0]) / norm(honest[0]), atol=1e-5)


@given(st.lists(st.floats(1e-3, 1e9), min_size=5, max_size=30))
@settings(max_examples=30)
def test_the_fifth_that_claims_most_has_no_more_than_its_share(claims: list[float]) -> None:
    one = adapter(np.random.default_rng(0), 1)
    accepted, refused = checked(contributions([one] * len(claims), claims))
    assert not refused
    weights = sorted((each.weight for each in accepted), reverse=True)
    assert sum(weights[: len(weights) // 5]) <= (MOST_SHARE + 1e-6) * sum(weights)
    assert all(each.weight <= claim for each, claim in zip(accepted, claims, strict=True))


def _broken(one: Adapter, name: str = "blk.0.attn_q", **values: float) -> Adapter:
    """With some value in one of the factors."""
    factors = dict(one.factors)
    for of, value in values.items():
        changed = getattr(factors[name], of).copy()
        changed[0, 0] = value
        factors[name] = replace(factors[name], **{of: changed})
    return replace(one, factors=factors)


def _other_shape(one: Adapter) -> Adapter:
    d_out, d_in = SHAPES["blk.0.attn_q"]
    other = adapter(np.random.default_rng(9), 4, shapes={**SHAPES, "blk.0.attn_q": (d_out, d_in + 1)})
    return replace(one, factors=other.factors)


def _unknown_matrix(one: Adapter) -> Adapter:
    return replace(one, factors={**one.factors, "blk.999.attn_q": one.factors["blk.0.attn_q"]})


def _halves_that_do_not_meet(one: Adapter) -> Adapter:
    of = one.factors["blk.0.attn_q"]
    return replace(one, factors={**one.factors, "blk.0.attn_q": Factors(of.a[:-1], of.b)})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda one: _broken(one, a=np.nan), "not finite"),
        (lambda one: _broken(one, b=np.inf), "not finite"),
        (lambda one: _broken(one, a=-np.inf, b=0.0), "not finite"),
        (lambda one: times(one, 0.0), "changes nothing"),
        (lambda one: replace(one, model="6" * 64), "another model"),
        (lambda one: replace(one, architecture="qwen2"), "another model"),
        (lambda one: replace(one, alpha=-16.0), "alpha"),
        (lambda one: replace(one, alpha=float("nan")), "alpha"),
        (lambda one: replace(one, centroid=np.array([np.nan], np.float32)), "centroid"),
        (_other_shape, r"must be \(12, 16\)"),
        (_unknown_matrix, "blk.999.attn_q"),
        (_halves_that_do_not_meet, "multiplied"),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["shapes told", "by majority"])
def test_what_is_broken_is_refused_with_a_reason_and_the_others_go_on(spoil, reason: str, told: bool) -> None:
    random = np.random.default_rng(0)
    fleet = contributions([adapter(random, 4) for _ in range(5)])
    fleet[2] = replace(fleet[2], load=lambda: spoil(adapter(random, 4)))
    accepted, refused = screen(fleet, MODEL, "llama", "flexlora", SHAPES if told else None)
    assert list(refused) == ["device-002"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refused["device-002"])
    assert len(accepted) == 4
    assert np.isfinite(flat(aggregate(accepted, "flexlora", [4], 16.0)[4])).all()


def test_a_file_that_can_not_be_read_is_refused_with_its_reason() -> None:
    def load() -> Adapter:
        raise BadAdapter("the file is truncated")

    one = adapter(np.random.default_rng(0), 4)
    accepted, refused = checked([Contribution("device", 1.0, load), *contributions([one])])
    assert refused == {"device": "the file is truncated"}
    assert len(accepted) == 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_one(weight: float) -> None:
    one = adapter(np.random.default_rng(0), 4)
    accepted, refused = checked(contributions([one, one], [1.0, weight]))
    assert list(refused) == ["device-001"]
    assert len(accepted) == 1


def test_nobody_and_nobody_sound() -> None:
    assert checked([]) == ([], {})
    one = times(adapter(np.random.default_rng(0), 4), 0.0)
    assert checked(contributions([one]))[0] == []


def test_a_fifth_can_not_make_a_matrix_up_but_devices_may_adapt_different_ones() -> None:
    random = np.random.default_rng(0)
    wide, of = adapter(random, 4), "blk.0.attn_q"
    narrow = replace(wide, factors={of: wide.factors[of]})
    told = contributions([wide] * 3 + [like(random, narrow, 0.5) for _ in range(7)])
    assert not checked(told)[1]
    made_up = contributions([_unknown_matrix(wide) for _ in range(2)], 1.0, "liar")
    assert sorted(checked(told[:8] + made_up)[1]) == ["liar-000", "liar-001"]


def test_of_two_that_disagree_on_a_shape_none_is_believed() -> None:
    one = adapter(np.random.default_rng(0), 4)
    assert len(checked(contributions([one, _other_shape(one)]))[1]) == 2


def test_a_frozen_a_must_be_the_one_of_most() -> None:
    devices = frozen_a(np.random.default_rng(0), [2, 4, 4, 6])
    accepted, refused = checked(contributions(devices), "ffa")
    assert not refused
    accepted, refused = checked(contributions([*devices, _broken(devices[1], a=1.0)]), "ffa")
    assert list(refused) == ["device-004"]
    assert "frozen" in refused["device-004"]
    aggregate(accepted, "ffa", [4], 16.0)


def test_where_a_alone_is_shared_a_alone_is_judged(common: Adapter) -> None:
    random = np.random.default_rng(0)
    started = [like(random, times(common, 0.0), 0.0, spread=0.5) for _ in range(8)]  # B is each one's own
    sharp = replace(started[0], factors={name: replace(of, a=-of.a) for name, of in started[0].factors.items()})
    large = replace(started[1], factors={name: replace(of, a=5.0 * of.a) for name, of in started[1].factors.items()})
    told = contributions([*(times(each, 0.0) for each in started), sharp, large])
    accepted, refused = checked(told, "fedsa")
    assert list(refused) == ["device-008"]
    clipped, honest = accepted[-1].load(), started[1]
    name = "blk.0.attn_q"
    ratio = np.linalg.norm(clipped.factors[name].a) / np.linalg.norm(honest.factors[name].a)
    assert ratio == pytest.approx(CLIP, rel=0.05)


def test_two_uploads_of_one_device_are_a_mistake_of_the_caller() -> None:
    one = adapter(np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match="device-000"):
        checked(contributions([one]) * 2)
