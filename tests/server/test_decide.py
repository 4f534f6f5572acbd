"""Verify reproduces the LLM's distribution, whatever the device's is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from models.engine.gguf import GgufEngine
from models.sampling import Shaped, log_softmax, shape, top_ids, uniform
from protocol.errors import RequestError
from protocol.resolve import Answer, Ask, Mode, Open, Sampling, pack_floats, pack_ids, unpack_floats, unpack_ids
from server.cloud.decide import decide, residual, support

VOCAB = 12
HOT = Sampling(temperature=1.0, top_k=0)
THIN = 8  # the device's own purpose for thinning


def request(sampling: Sampling = HOT, mode: Mode = "verify", top: int = 5) -> Open:
    return Open(1, "x", "t", sampling, mode, top)


def offered(x: Shaped, draft: int, most: int) -> Ask:
    """What a device says of x: its `most` likeliest tokens, the draft, and the mass of the rest."""
    ids = top_ids(x.p, most) if x.ids is None else np.arange(len(x.ids))[:most]
    known, p = (ids if x.ids is None else x.ids[ids]), x.p[ids]
    if draft not in known:
        known, p = np.append(known, draft), np.append(p, np.float32(x.at(draft)))
    tail = max(0.0, 1.0 - float(p.sum())) if len(p) < len(x.p) else 0.0
    return Ask(1, 1, 0, draft=draft, x_ids=pack_ids(known), x_p=pack_floats(p), x_tail=tail)


def emitted(answer: Answer, ask: Ask, x: Shaped, seed: int) -> int:
    """The device's share of verify: it thins out candidates of which the cloud did not know x."""
    known = unpack_ids(ask.x_ids)
    for index, (token, y_p) in enumerate(zip(answer.tokens, unpack_floats(answer.tokens_p), strict=True)):
        if token in known or uniform(seed, 0, THIN + index) >= x.at(token) / y_p:
            return token
    return answer.tokens[-1]


def simulate(
    x_logits: NDArray[np.float32], y_logits: NDArray[np.float32], sampling: Sampling, most: int, samples: int
) -> float:
    """The p-value of what is emitted against y."""
    counts = np.zeros(len(y_logits))
    y = shape(y_logits, sampling)
    for seed in range(samples):
        opened = request(msgspec.structs.replace(sampling, seed=seed))
        x = shape(x_logits, opened.sampling)
        ask = offered(x, x.draw(uniform(seed, 0)), most)
        counts[emitted(decide(y_logits, opened, ask, []), ask, x, seed)] += 1
    expected = np.zeros(len(y_logits))
    expected[slice(None) if y.ids is None else y.ids] = y.p / y.p.sum(dtype=np.float64) * samples
    rare = expected < 5
    assert counts[expected == 0].sum() == 0
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    return float(chisquare(seen[keep], wanted[keep] * (seen.sum() / wanted.sum())).pvalue)


def peaked(token: int, height: float = 4.0) -> NDArray[np.float32]:
    logits = np.linspace(0.0, 1.0, VOCAB).astype(np.float32)
    logits[token] += height
    return logits


DISJOINT = np.where(np.arange(VOCAB) < 6, 0.0, -60.0).astype(np.float32)


@pytest.mark.parametrize("most", [1, 3, VOCAB])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(peaked(2), peaked(9), id="peaked elsewhere"),
        pytest.param(peaked(2), peaked(2, 2.5), id="peaked alike"),
        pytest.param(DISJOINT, DISJOINT[::-1].copy(), id="disjoint"),
        pytest.param(np.zeros(VOCAB, np.float32), peaked(4, 1.0), id="x flat"),
        pytest.param(peaked(4, 8.0), np.zeros(VOCAB, np.float32), id="y flat"),
    ],
)
def test_what_is_emitted_follows_y(x: NDArray[np.float32], y: NDArray[np.float32], most: int) -> None:
    assert simulate(x, y, HOT, most, 1200) > 1e-4


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_k=4),
        Sampling(temperature=1.5, top_k=0),
        Sampling(temperature=0.9, top_k=6, top_p=0.8, min_p=0.05),
    ],
)
def test_what_is_emitted_follows_y_as_the_request_shapes_it(sampling: Sampling) -> None:
    assert simulate(peaked(2, 2.0), peaked(3, 1.5), sampling, 3, 1200) > 1e-4


def test_a_real_pair(smollm2: Path, smollm2_q2: Path) -> None:
    x, y = (_logits(path, "Once upon a time there was a") for path in (smollm2_q2, smollm2))
    assert np.abs(log_softmax(x) - log_softmax(y)).max() > 0.1, "the pair is no pair"
    assert simulate(x, y, Sampling(temperature=1.0, top_k=40), 8, 600) > 1e-4


def _logits(path: Path, text: str) -> NDArray[np.float32]:
    engine = GgufEngine(path, context=256, sequences=1, threads=1, hidden=False)
    try:
        tokens = engine.tokenizer.encode(text, start=True)
        return engine.forward([(engine.open(tokens, 1), tokens)])[0].logits.copy()
    finally:
        engine.close()


logits_arrays = st.lists(st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB).map(
    lambda values: np.array(values, np.float32)
)


@given(logits_arrays, logits_arrays, st.integers(1, VOCAB), st.sampled_from([0, 1, 3, 7]))
@settings(deadline=None)
def test_what_is_emitted_follows_y_in_closed_form(
    x_logits: NDArray[np.float32], y_logits: NDArray[np.float32], most: int, top_k: int
) -> None:
    """The sum over all drafts of what is accepted and of what is drawn instead, thinned out, is y."""
    sampling = Sampling(temperature=1.0, top_k=top_k)
    x_shaped, y_shaped = shape(x_logits, sampling), shape(y_logits, sampling)
    x, y = (np.array([each.at(token) for token in range(VOCAB)], np.float64) for each in (x_shaped, y_shaped))
    emitted = np.zeros(VOCAB)
    for draft in np.flatnonzero(x > 1e-12):
        known = support(offered(x_shaped, int(draft), most), VOCAB)
        rest = residual(y_shaped, known, VOCAB)
        drawn = np.zeros(VOCAB)
        drawn[slice(None) if rest.ids is None else rest.ids] = rest.p
        elsewhere = np.setdiff1d(np.flatnonzero(drawn), known.ids)
        drawn[elsewhere] *= np.maximum(0.0, 1.0 - x[elsewhere] / y[elsewhere])
        accept = min(1.0, y[draft] / x[draft])
        emitted[draft] += x[draft] * accept
        if accept < 1.0 and drawn.sum() > 1e-6:
            emitted += x[draft] * (1.0 - accept) * drawn / drawn.sum()
        elif accept < 1.0:
            emitted[draft] += x[draft] * (1.0 - accept)
    np.testing.assert_allclose(emitted, y, atol=2e-4)


@given(logits_arrays, st.integers(0, VOCAB - 1), st.integers(0, 2**63))
@settings(deadline=None)
def test_greedy_verify_is_take(y: NDArray[np.float32], draft: int, seed: int) -> None:
    greedy = Sampling(seed=seed)
    ask = Ask(1, 1, 0, draft=draft, x_ids=pack_ids(np.array([draft])), x_p=pack_floats(np.ones(1)))
    verified = decide(y, request(greedy), ask, [])
    assert verified.tokens == decide(y, request(greedy, "take"), ask, []).tokens == [int(y.argmax())]


@given(logits_arrays, st.integers(0, 2**63))
@settings(deadline=None)
def test_an_equal_distribution_accepts_every_draft(y: NDArray[np.float32], seed: int) -> None:
    sampling = Sampling(temperature=0.8, top_k=0, seed=seed)
    x = shape(y, sampling)
    ask = offered(x, x.draw(uniform(seed, 0)), VOCAB)
    assert decide(y, request(sampling), ask, []).tokens == [ask.draft]


@given(logits_arrays, st.integers(0, 20), st.integers(-1, VOCAB - 1))
@settings(deadline=None)
def test_y_is_at_temperature_1_whatever_the_sampling(y: NDArray[np.float32], top: int, draft: int) -> None:
    sampling = Sampling(temperature=0.3, top_k=2, repetition_penalty=1.5)
    answer = decide(y, request(sampling, "fuse", top), Ask(1, 7, 0, draft=draft), [1, 2])
    logp = log_softmax(y)
    ids = unpack_ids(answer.y_ids)
    assert answer.tokens == []
    assert ids.tolist() == top_ids(logp, top).tolist() if top else len(ids) == 0
    np.testing.assert_allclose(unpack_floats(answer.y_logp), logp[ids.astype(int)], rtol=1e-6)
    assert answer.y_draft == pytest.approx(np.exp(logp[draft]) if draft >= 0 else -1.0)


def test_the_repetition_penalty_sees_the_answer() -> None:
    y = np.array([3.0, 2.9, 0.0], np.float32)
    opened = request(Sampling(repetition_penalty=1.5), "take")
    assert decide(y, opened, Ask(1, 1, 0), []).tokens == [0]
    assert decide(y, opened, Ask(1, 1, 0), [0]).tokens == [1]


@pytest.mark.parametrize(
    "ask",
    [
        Ask(1, 1, 0, draft=3),
        Ask(1, 1, 0, draft=3, x_ids=b"abc", x_p=b"abcd"),
        Ask(1, 1, 0, draft=3, x_ids=pack_ids(np.array([3, 4])), x_p=pack_floats(np.ones(1))),
        Ask(1, 1, 0, draft=VOCAB, x_ids=pack_ids(np.array([VOCAB])), x_p=pack_floats(np.ones(1))),
        Ask(1, 1, 0, draft=3, x_ids=pack_ids(np.array([3, 3])), x_p=pack_floats(np.ones(2))),
        Ask(1, 1, 0, draft=3, x_ids=pack_ids(np.array([3])), x_p=pack_floats(np.array([np.nan]))),
        Ask(1, 1, 0, draft=3, x_ids=pack_ids(np.array([3])), x_p=pack_floats(np.ones(1)), x_tail=float("nan")),
    ],
)
def test_a_senseless_x_is_refused(ask: Ask) -> None:
    with pytest.raises(RequestError):
        decide(np.zeros(VOCAB, np.float32), request(), ask, [])
