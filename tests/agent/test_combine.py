"""What a reply does to a step: statistically, against the distributions themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from agent.combine import OFFERED, combine, complete, dense, fuse, offer, verify
from agent.resolver import Reply
from models.sampling import Shaped, shape, softmax, uniform
from protocol.resolve import Sampling

DRAWS = 8000
WARM = Sampling(temperature=1.0, top_k=0)
Logits = NDArray[np.float32]


def random_logits(seed: int, vocab: int, spread: float) -> Logits:
    return (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)


def follows(seen: Sequence[int], p: NDArray[np.floating]) -> bool:
    """Chi-square, cells with an expectation under 5 put together."""
    counts = np.bincount(seen, minlength=len(p)).astype(float)
    expected = p.astype(float) / p.astype(float).sum() * len(seen)
    small = expected < 5.0
    if counts[expected == 0.0].sum():
        return False
    cells = np.append(counts[~small], counts[small].sum()), np.append(expected[~small], expected[small].sum())
    kept = cells[1] > 0.0
    return bool(stats.chisquare(cells[0][kept], cells[1][kept]).pvalue > 1e-4)


def reply(tokens: Sequence[int] = (), tokens_p: Sequence[float] = (), y: dict[int, float] | None = None) -> Reply:
    ids = np.array(list(y or {}), np.intp)
    return Reply(tokens, tokens_p, ids, np.array(list((y or {}).values()), np.float32), -1.0)


PAIRS = {
    "alike": (random_logits(1, 50, 1.0), random_logits(1, 50, 1.1)),
    "different": (random_logits(1, 50, 2.0), random_logits(2, 50, 2.0)),
    "sure and unsure": (random_logits(3, 50, 8.0), random_logits(4, 50, 0.1)),
    "unsure and sure": (random_logits(3, 50, 0.1), random_logits(4, 50, 4.0)),
    "opposite": (np.linspace(-4, 4, 50, dtype=np.float32), np.linspace(4, -4, 50, dtype=np.float32)),
}


class TestVerify:
    """The emitted token follows y, whatever x is."""

    @pytest.mark.parametrize("pair", PAIRS)
    @pytest.mark.parametrize(
        "sampling", [WARM, Sampling(0.7, 20), Sampling(1.2, 0, 0.9), Sampling(1.0, 5), Sampling(1.0, 0, 1.0, 0.1)]
    )
    def test_with_all_of_y_known(self, pair: str, sampling: Sampling) -> None:
        x, y = (shape(logits, sampling) for logits in PAIRS[pair])
        seen = [verify(x.draw(uniform(seed, 3)), x, y, 50, seed, 3) for seed in range(DRAWS)]
        assert follows(seen, dense(y, 50))

    @pytest.mark.parametrize("pair", PAIRS)
    def test_by_way_of_a_reply_that_names_all_of_y(self, pair: str) -> None:
        x_logits, y_logits = PAIRS[pair]
        y = softmax(y_logits)
        whole = reply(y=dict(enumerate(y.tolist())))
        x = shape(x_logits, WARM)
        seen = [self.emitted(x, x_logits, whole, seed) for seed in range(6000)]
        assert follows(seen, y)

    @staticmethod
    def emitted(x: Shaped, logits: Logits, answer: Reply, seed: int) -> int:
        sampling = Sampling(temperature=1.0, top_k=0, seed=seed)
        return combine("verify", 0.5, x.draw(uniform(seed, 3)), logits, answer, sampling, (), 3)

    def test_of_equal_distributions_accepts_always(self) -> None:
        x = shape(PAIRS["alike"][0], WARM)
        for seed in range(500):
            draft = x.draw(uniform(seed, 0))
            assert verify(draft, x, x, 50, seed, 0) == draft

    def test_of_one_certain_token_gives_that(self) -> None:
        x = shape(PAIRS["different"][0], WARM)
        y = shape(PAIRS["different"][1], Sampling())
        assert {verify(x.draw(uniform(seed, 0)), x, y, 50, seed, 0) for seed in range(200)} == {y.draw(0.0)}


class TestThinning:
    """The resolver knows x only where it was offered, and decides on its own y; the device has the last word."""

    VOCAB = 300
    CANDIDATES = 8

    def decided(self, x: Shaped, y: Shaped, draft: int, random: np.random.Generator) -> Reply:
        """The resolver's side of mode verify, on what `offer` tells it."""
        ids, p, _ = offer(x, draft)
        known = dict(zip(ids.tolist(), p.tolist(), strict=True))
        if random.random() * known[draft] < y.at(draft):
            return reply([draft], [y.at(draft)])
        wide = dense(y, self.VOCAB).astype(np.float64)
        rest = wide.copy()
        rest[ids] = np.maximum(wide[ids] - p, 0.0)
        rest /= rest.sum()
        tokens: list[int] = []
        while len(tokens) < self.CANDIDATES:
            tokens.append(int(random.choice(self.VOCAB, p=rest)))
            if tokens[-1] in known:
                break
        return reply(tokens, [float(y.at(token)) for token in tokens])

    @pytest.mark.parametrize("spreads", [(0.3, 0.3), (1.0, 2.0), (2.0, 0.5), (0.1, 3.0)])
    def test_makes_the_resolvers_draws_follow_y(self, spreads: tuple[float, float]) -> None:
        logits = random_logits(5, self.VOCAB, spreads[0])
        x = shape(logits, WARM)
        y = shape(random_logits(6, self.VOCAB, spreads[1]), WARM)
        random = np.random.default_rng(7)
        seen = []
        for seed in range(DRAWS):
            draft = x.draw(uniform(seed, 2))
            answer = self.decided(x, y, draft, random)
            sampling = Sampling(temperature=1.0, top_k=0, seed=seed)
            seen.append(combine("verify", 0.5, draft, logits, answer, sampling, (), 2))
        assert follows(seen, dense(y, self.VOCAB))

    def test_is_needed(self) -> None:
        """Without it the same draws do not follow y: the test above can fail."""
        logits = random_logits(5, self.VOCAB, 0.3)
        x, y = shape(logits, WARM), shape(random_logits(6, self.VOCAB, 0.3), WARM)
        random = np.random.default_rng(7)
        drafts = [x.draw(uniform(seed, 2)) for seed in range(DRAWS)]
        seen = [self.decided(x, y, draft, random).tokens[0] for draft in drafts]
        assert not follows(seen, dense(y, self.VOCAB))

    def test_where_all_of_x_was_offered_takes_the_first(self) -> None:
        sampling = Sampling(temperature=1.0, top_k=40)
        logits = random_logits(5, self.VOCAB, 1.0)
        x = shape(logits, sampling)
        other = int(offer(x, x.draw(0.0))[0][-1])
        answer = reply([other, 7, 8], [0.1, 0.1, 0.1])
        assert combine("verify", 0.5, x.draw(0.0), logits, answer, sampling, (), 0) == other


class TestOffer:
    @pytest.mark.parametrize(
        "sampling", [WARM, Sampling(1.0, 40), Sampling(1.0, 200), Sampling(), Sampling(1.0, 0, 0.5)]
    )
    @pytest.mark.parametrize("draft", [0, 17, 299])
    def test_tells_the_likeliest_the_draft_and_the_rest(self, sampling: Sampling, draft: int) -> None:
        x = shape(random_logits(9, 300, 1.0), sampling)
        ids, p, tail = offer(x, draft)
        assert draft in ids
        assert len(set(ids.tolist())) == len(ids) == len(p) <= OFFERED + 1
        assert p.tolist() == [x.at(int(token)) for token in ids]
        assert float(p.sum()) + tail == pytest.approx(1.0, abs=1e-5)
        largest = np.sort(x.p)[::-1][: min(OFFERED, len(x.p))]
        np.testing.assert_allclose(np.sort(p[: len(largest)])[::-1], largest)


class TestComplete:
    @given(seed=st.integers(0, 1000), named=st.integers(1, 40), mass=st.floats(0.05, 1.0), spread=st.floats(0.1, 9.0))
    def test_sums_to_1_and_rules_out_nothing(self, seed: int, named: int, mass: float, spread: float) -> None:
        x = softmax(random_logits(seed, 200, spread))
        random = np.random.default_rng(seed)
        ids = random.choice(200, named, replace=False)
        p = random.dirichlet(np.ones(named)) * mass
        y = complete(x, reply(y=dict(zip(ids.tolist(), p.tolist(), strict=True))))
        assert float(y.sum()) == pytest.approx(1.0, abs=1e-4)
        np.testing.assert_allclose(y[ids], p, rtol=1e-5, atol=1e-7)
        if mass < 0.999:
            assert (np.delete(y, ids) > 0.0).all()

    def test_the_tail_lies_where_x_lies(self) -> None:
        x = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
        assert complete(x, reply(y={1: 0.6})) == pytest.approx(
            np.array([0.4 * 5 / 7, 0.6, 0.4 * 1.5 / 7, 0.4 * 0.5 / 7])
        )

    def test_of_nothing_is_x(self) -> None:
        x = softmax(random_logits(1, 100, 1.0))
        np.testing.assert_allclose(complete(x, reply()), x, rtol=1e-5)

    def test_survives_a_sum_over_1(self) -> None:
        x = softmax(random_logits(1, 100, 1.0))
        y = complete(x, reply(y={3: 0.7, 4: 0.305}))
        assert (y >= 0.0).all()
        assert y[3] == pytest.approx(0.7)

    def test_leaves_x_as_it_was(self) -> None:
        x = softmax(random_logits(1, 100, 1.0))
        before = x.copy()
        complete(x, reply(y={3: 0.7}))
        fuse(x, reply(y={3: 0.7}), 0.5)
        np.testing.assert_array_equal(x, before)


class TestFuse:
    Y: ClassVar = {3: 0.5, 90: 0.3, 7: 0.1}

    def emitted(self, weight: float, logits: Logits, draft: int, sampling: Sampling) -> int:
        return combine("fuse", weight, draft, logits, reply([90], [0.3], self.Y), sampling, (), 1)

    def test_with_weight_1_is_the_draft(self) -> None:
        logits = random_logits(1, 100, 1.0)
        for sampling in (Sampling(), WARM, Sampling(1.0, 5, repetition_penalty=2.0)):
            assert [self.emitted(1.0, logits, draft, sampling) for draft in (0, 50, 99)] == [0, 50, 99]

    @pytest.mark.parametrize("weight", [0.0, 0.3, 0.8])
    def test_follows_the_mixture(self, weight: float) -> None:
        logits = random_logits(1, 100, 1.0)
        x = softmax(logits)
        wanted = weight * x + (1.0 - weight) * complete(x, reply(y=self.Y))
        np.testing.assert_allclose(fuse(x, reply(y=self.Y), weight), wanted, rtol=1e-5)
        seen = [self.emitted(weight, logits, 0, Sampling(1.0, 0, seed=seed)) for seed in range(5000)]
        assert follows(seen, wanted)

    def test_with_weight_0_and_greedy_is_the_llms(self) -> None:
        assert self.emitted(0.0, random_logits(1, 100, 5.0), 0, Sampling()) == 3


class TestTake:
    def test_is_the_llms_token(self) -> None:
        logits = random_logits(1, 100, 1.0)
        for sampling in (Sampling(), WARM):
            for token in (0, 42, 99):
                assert combine("take", 0.5, 42, logits, reply([token], [0.0]), sampling, (), 0) == token

    def test_without_a_decision_follows_y(self) -> None:
        logits = random_logits(1, 100, 1.0)
        answer = reply(y={5: 0.6, 6: 0.3})
        assert combine("take", 0.5, 42, logits, answer, Sampling(), (), 0) == 5
        seen = [combine("take", 0.5, 42, logits, answer, Sampling(1.0, 0, seed=s), (), 0) for s in range(5000)]
        assert follows(seen, complete(softmax(logits), answer))

    def test_the_same_step_is_decided_alike(self) -> None:
        logits = random_logits(1, 100, 1.0)
        for mode in ("verify", "fuse", "take"):
            emitted = {combine(mode, 0.5, 4, logits, reply(y={5: 0.5, 6: 0.3}), WARM, (), 9) for _ in range(5)}
            assert len(emitted) == 1
