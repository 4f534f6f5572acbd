"""What the arms do on recorded steps with known properties."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from protocol.errors import ConfigError
from tests.tools.recorded_steps import ASK, OPEN, REPLY, decisions
from tools.eval.arms import Arm, arms, run
from tools.eval.arms_learned import AUDIT, START, Centralised, Flat, Hierarchical, Local, Similar
from tools.eval.arms_memory import Memory
from tools.eval.arms_routers import Head, Query, Uhlm, logistic, sigmoid
from tools.eval.fleets import ROUNDS, Pool, fleet, pool, room, skew
from tools.eval.play import Policy, Seen, play
from tools.eval.views import Views

PRICE = 0.4


def arm(name: str, steps: Pool) -> Arm:
    return next(one for one in arms(steps) if one.name == name)


@pytest.fixture(scope="module")
def long() -> Pool:
    """Many steps for each device: there is something to learn."""
    return pool([decisions(160, steps=60)])


def test_each_request_has_one_device_and_no_document_is_both_learned_and_measured_on() -> None:
    steps = pool([decisions(200, steps=3)])
    drawn = fleet(steps, 8, 0.3, seed=1)
    learned = np.concatenate(drawn.stream)
    assert len(drawn.stream) == ROUNDS
    assert sorted([*learned, *drawn.fresh]) == list(range(600))
    assert not set(steps.data.document[learned]) & set(steps.data.document[drawn.fresh])
    for request in range(200):
        assert len(set(drawn.device[steps.data.item == request])) == 1
    assert set(drawn.device[drawn.fresh]) == set(drawn.device[learned]) == set(range(8))
    for rows in drawn.stream:  # a request's steps come in their order
        for request in set(steps.data.item[rows]):
            assert np.diff(rows[steps.data.item[rows] == request]).min(initial=1) == 1


def test_a_seed_draws_a_fleet_and_alpha_its_skew() -> None:
    steps = pool([decisions(400)])
    again, other = fleet(steps, 8, 0.3, seed=1), fleet(steps, 8, 0.3, seed=2)
    assert (fleet(steps, 8, 0.3, seed=1).device == again.device).all()
    assert (other.device != again.device).any()
    alike, apart = (skew(steps, fleet(steps, 8, alpha, seed=1)) for alpha in (100.0, 0.1))
    assert alike < 0.2
    assert apart > 0.5


def test_devices_of_a_mixed_fleet_have_the_steps_of_their_own_model() -> None:
    steps = pool([decisions(200, slm="one"), decisions(200, slm="two", seed=3)])
    drawn = fleet(steps, 6, 0.5, seed=0)
    assert steps.slms == ("one", "two")
    taken = drawn.device >= 0
    assert taken.sum() == 200
    assert (steps.kind[taken] == drawn.kind[drawn.device[taken]]).all()
    assert {(c, k) for c, k in zip(drawn.cluster, drawn.kind, strict=True)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_fleet_needs_some_texts() -> None:
    assert room(pool([decisions(40)])) == 5
    with pytest.raises(ConfigError, match="too few"):
        room(pool([decisions(15)]))


class Everything(Policy):
    """Escalates half of the steps, and notes what devices have seen."""

    audit = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Seen]] = []

    def ask(self, rows: np.ndarray) -> np.ndarray:
        return rows % 2 == 0

    def learn(self, at: int, seen: list[Seen]) -> None:  # type: ignore[override]
        self.seen.append(seen)


def test_devices_see_what_was_sent_and_with_which_propensity() -> None:
    steps = pool([decisions(200, steps=5)])
    drawn = fleet(steps, 4, 1.0, seed=0)
    policy = Everything()
    streamed = play(steps, drawn, policy, seed=0)
    rows = np.concatenate(drawn.stream)
    assert (streamed.asked[rows] == (rows % 2 == 0)).all()
    odd = rows[rows % 2 == 1]
    assert 0.1 < streamed.audits[odd].mean() < 0.3
    assert not streamed.audits[rows[rows % 2 == 0]].any()
    assert not (streamed.asked | streamed.audits)[drawn.fresh].any()
    for device, one in enumerate(policy.seen[-1]):
        own = rows[drawn.device[rows] == device]
        sample = one.sample(steps.data, policy.audit)
        assert set(one.rows) == set(own[(streamed.asked | streamed.audits)[own]])
        assert set(sample.propensity[one.rows % 2 == 1]) == {policy.audit}
        assert set(sample.propensity[one.rows % 2 == 0]) == {1.0}
        assert sample.steps <= len(own) < sample.steps + 20  # the last ones that were kept come with the next row
        assert one.histogram(steps.data).total == pytest.approx(len(own), rel=0.02)


def test_fixed_arms_do_what_they_are_called() -> None:
    steps = pool([decisions(400)])
    drawn = fleet(steps, 5, 1.0, seed=0)
    alone = run(arm("slm_only", steps), steps, drawn, 0.0, seed=0)
    assert alone.sent.sum() == 0
    assert sum(alone.bytes.values()) == 0
    whole = run(arm("llm_only", steps), steps, drawn, 1.0, seed=0)
    assert (whole.sent == 1).all()
    assert whole.bytes["uplink"] == 400 * (ASK + OPEN)
    assert whole.bytes["downlink"] == 400 * REPLY
    assert whole.stream["right"] == whole.stream["agree"] == whole.stream["steps"] == 200
    static = run(arm("static", steps), steps, drawn, 0.3, seed=0)
    assert static.sent.mean() == pytest.approx(0.3, abs=0.01)
    sent = static.sent == 1
    assert steps.data.u[drawn.fresh][sent].min() > steps.data.u[drawn.fresh][~sent].max()
    oracle = run(arm("oracle", steps), steps, drawn, 0.3, seed=0)
    missed = steps.data.differs[drawn.fresh] & (oracle.sent == 0)
    assert not missed.any() or steps.data.differs[drawn.fresh][oracle.sent == 1].all()


@pytest.mark.parametrize("policy", [Flat, Hierarchical, Similar, Centralised])
def test_what_is_learned_together_comes_near_the_best_threshold(policy: type[Flat], long: Pool) -> None:
    drawn = fleet(long, 8, 1.0, seed=0)
    learned = policy(long, drawn, PRICE)
    play(long, drawn, learned, seed=0)
    u, beta = long.data.u[drawn.fresh], long.data.beta[drawn.fresh]
    costs = [np.where(u > tau, PRICE, beta).mean() for tau in np.linspace(0, 1, 101)]
    reached = np.where(learned.ask(drawn.fresh), PRICE, beta).mean()
    assert reached < min(costs) + 0.01
    assert np.where(u > START, PRICE, beta).mean() > min(costs) + 0.02  # where it began
    assert min(learned.learning_bytes) > 0


def test_one_threshold_for_all_or_one_for_each() -> None:
    steps = pool([decisions(160, steps=60, by_label=0.25)])
    drawn = fleet(steps, 8, 0.1, seed=0)
    flat, personal, local = Flat(steps, drawn, PRICE), Similar(steps, drawn, PRICE), Local(steps, drawn, PRICE)
    for policy in (flat, personal, local):
        play(steps, drawn, policy, seed=0)
    assert np.ptp(flat.tau) == 0
    assert np.ptp(personal.tau) > 0.05
    assert local.learning_bytes == [0, 0]
    mean_label = [steps.data.label[drawn.device == device].mean() for device in range(8)]
    assert np.corrcoef(mean_label, personal.tau)[0, 1] < -0.5  # who is rejected more often asks sooner


def test_learning_costs_audits_and_small_messages(long: Pool) -> None:
    drawn = fleet(long, 8, 1.0, seed=0)
    played = run(arm("federated_similar", long), long, drawn, PRICE, seed=0)
    kept = played.stream["steps"] - played.stream["escalations"]
    assert 0.3 * AUDIT * kept < played.stream["audits"] < 3 * AUDIT * kept
    assert played.sent.mean() == pytest.approx((played.asked + AUDIT * (1 - played.asked)).mean())
    assert played.bytes["audits"] > 0
    assert 100 < played.bytes["rounds"] / 8 / ROUNDS < 1500
    assert played.by_round.shape == (ROUNDS, len(drawn.fresh))
    assert (played.by_round[-1] == (played.asked == 1)).all()


def test_uhlm_asks_about_everything_until_it_has_its_line(long: Pool) -> None:
    drawn = fleet(long, 8, 1.0, seed=0)
    averse, prone = Uhlm(long, drawn, averse=True), Uhlm(long, drawn, averse=False)
    for policy in (averse, prone):
        assert policy.ask(drawn.fresh).all()
        streamed = play(long, drawn, policy, seed=0)
        assert streamed.asked[drawn.stream[0]].all()
        assert not streamed.audits.any()
        assert policy.learning_bytes[0] > 0
    assert averse.tau < prone.tau


def test_the_query_router_sends_whole_requests(long: Pool) -> None:
    drawn = fleet(long, 8, 1.0, seed=0)
    router = Query(long, drawn, 0.3)
    streamed = play(long, drawn, router, seed=0)
    assert streamed.asked[drawn.stream[0]].all()
    assert not streamed.asked[drawn.stream[-1]].all()
    asked = router.ask(drawn.fresh)
    for request in set(long.data.item[drawn.fresh]):
        assert len(set(asked[long.data.item[drawn.fresh] == request])) == 1


def test_the_query_router_finds_what_the_state_tells() -> None:
    data = decisions(400)
    data = dataclasses.replace(data, differs=data.hidden[:, 0] > 0)
    steps = pool([data])
    drawn = fleet(steps, 8, 1.0, seed=0)
    router = Query(steps, drawn, 0.5)
    play(steps, drawn, router, seed=0)
    asked = router.ask(drawn.fresh)
    assert data.differs[drawn.fresh][asked].mean() > 0.85


def test_the_head_sees_what_u_does_not() -> None:
    steps = pool([decisions(160, steps=60, blind=True)])
    drawn = fleet(steps, 8, 1.0, seed=0)
    head = Head(steps, drawn, PRICE)
    play(steps, drawn, head, seed=0)
    asked = head.ask(drawn.fresh)
    sure = steps.data.p_max[drawn.fresh]
    assert sure[asked].max() < sure[~asked].min() + 0.1
    assert 0.0 < asked.mean() < 1.0


def test_a_logistic_fit_is_where_the_gradient_vanishes() -> None:
    rng = np.random.default_rng(0)
    inputs, weights, near = rng.standard_normal((200, 3)), rng.random(200), rng.standard_normal(3)
    goal = sigmoid(inputs @ np.array([1.0, -2.0, 0.5]))
    fitted = logistic(inputs, goal, weights, near, held=1.0)
    gradient = inputs.T @ (weights * (sigmoid(inputs @ fitted) - goal)) + (fitted - near)
    assert np.abs(gradient).max() < 1e-3


@pytest.fixture
def recurring() -> Pool:
    """The SLM is unsure, always wrong and in one of two states, each of which has its answer."""
    data = decisions(400, labels=2)
    n = 400
    data = dataclasses.replace(
        data,
        u=np.full(n, 0.9, np.float32),
        beta=np.ones(n, np.float32),
        differs=np.ones(n, bool),
        slm_right=np.zeros(n, bool),
    )
    unit = np.eye(2, 128, dtype=np.float32)[data.label]
    said = data.label.astype(np.intp)
    x = np.full((n, 2), 0.5, np.float32)
    return pool([data], Views(1 - said, said, x, (127 * unit).astype(np.int8), unit @ unit.T))


def test_memory_spares_calls_where_a_task_recurs(recurring: Pool) -> None:
    drawn = fleet(recurring, 6, 1.0, seed=0)
    with_memory = run(arm("peer_memory", recurring), recurring, drawn, 0.1, seed=0)
    without = run(arm("federated_similar", recurring), recurring, drawn, 0.1, seed=0)
    assert without.sent.mean() > 0.99
    assert with_memory.sent.mean() < 0.5
    assert with_memory.right[with_memory.memory].all()
    assert with_memory.agree[with_memory.memory].all()
    assert with_memory.stream["right"] == with_memory.stream["steps"]
    assert with_memory.bytes["peers"] > 0
    assert "peer_memory" not in {one.name for one in arms(pool([decisions(10)]))}


def test_devices_learn_from_what_memory_left_over(recurring: Pool) -> None:
    drawn = fleet(recurring, 6, 1.0, seed=0)
    policy = Memory(recurring, drawn, 0.1)
    streamed = play(recurring, drawn, policy, seed=0)
    stream = np.concatenate(drawn.stream)
    assert (streamed.written[stream] >= 0).any()
    assert not (streamed.asked & (streamed.written >= 0)).any()
    assert (streamed.asked | (streamed.written >= 0))[stream].all()
