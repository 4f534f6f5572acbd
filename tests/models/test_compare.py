"""Two models on the same text: what is read from each, and what comes of the pair."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from agent.adapt.plain_text import PASSAGES
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from models.engine.open import open_tokenizer
from models.workshop.child import here
from models.workshop.compare import Comparison, compare
from models.workshop.job import Job
from models.workshop.measure import look_into, measure, measure_in
from models.workshop.measure_model import Asked
from models.workshop.perplexity import (
    common_beginnings,
    distributions_at,
    divergences,
    exp_mean,
    mean,
    read,
)
from models.workshop.speed import ASKED, READ, WRITTEN, speed
from protocol.errors import BadModelFile, ConfigError, DiskFull, WorkshopError
from tests.models.tiny import Tiny

TOKENS = 96  # of each passage: fewer, and Q2 is not worse by more than chance
SHORT = 24
LENGTHS = (7, 12, 2)


def run(first: Path, second: Path, cache: Path, tokens: int, job: Job | None = None) -> Comparison:
    job = job or Job(os.environ)
    return compare(first, second, PASSAGES, cache, tokens=tokens, threads=1, rounds=1, job=job)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny("llama").write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    engine = GgufEngine(tiny, context=256, sequences=2, threads=1, hidden=False, kv="f16")
    yield engine
    engine.close()


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    logs: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return logs


def test_losses_and_distributions_are_those_of_the_model(engine: Engine, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    passages = [rng.integers(0, engine.info.vocab, length).tolist() for length in LENGTHS]
    with (tmp_path / "kept").open("wb") as file:
        reading = read(engine, passages[:2], file)  # side by side, one ends before the other
    one_by_one = read(engine, [passages[1]], None)
    assert reading.losses[LENGTHS[0] - 1 :] == pytest.approx(one_by_one.losses, abs=1e-3)

    model = Tiny("llama")
    said = [
        (tokens[at], log_softmax(model.logits(tokens[:at]))) for tokens in passages[:2] for at in range(1, len(tokens))
    ]
    assert reading.losses == pytest.approx([-logs[token] for token, logs in said], abs=0.02)
    assert [int(logs.argmax()) for _, logs in said] == reading.likeliest.tolist()
    kept = distributions_at(tmp_path / "kept", engine.info.vocab)
    assert kept.shape == (len(said), engine.info.vocab)
    for row, (_, logs) in zip(kept, said, strict=True):
        assert log_softmax(row) == pytest.approx(logs, abs=0.05)


def test_passages_that_do_not_fit_side_by_side_are_read_in_turn(engine: Engine) -> None:
    passages = [[5, *range(40, 90), *range(90)], [6, *range(30)] * 4, [1, 2]]
    assert sum(map(len, passages)) > engine.context
    alone = [read(engine, [tokens], None).losses for tokens in passages]
    assert read(engine, passages, None).losses == pytest.approx(np.concatenate(alone), abs=1e-3)


def test_divergence_of_distributions() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (90, 500))
    for noise in (0.01, 0.3, 3):
        pair = np.array([logits, logits + rng.normal(0, noise, logits.shape)])
        first, second = (pair - pair.max(axis=2, keepdims=True)).astype(np.float16)
        p, q = (np.array([log_softmax(row) for row in one]) for one in pair)
        expected = (np.exp(p) * (p - q)).sum(axis=1)
        found = divergences(first, second)
        assert found == pytest.approx(expected, abs=5e-3)
        assert found.mean() == pytest.approx(expected.mean(), abs=1e-4)
        assert (divergences(first, first) == 0).all()
    assert divergences(second, first).mean() != pytest.approx(found.mean(), rel=0.01)  # in this order


def test_a_mean_comes_with_what_chance_makes_of_it() -> None:
    found = mean(np.array([0.0, 1.0, 1.0, 1.0]), 0.0, 1.0)
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - 1.96 * 0.25)
    assert found.high == 1.0
    perplexity = exp_mean(np.log([2.0, 8.0, 4.0]))
    assert perplexity.value == pytest.approx(4.0)
    assert perplexity.low * perplexity.high == pytest.approx(16.0)
    draws = np.random.default_rng(1).normal(0, 1, (2000, 50))
    covered = np.mean([one.low < 0 < one.high for one in map(mean, draws)])
    assert 0.92 < covered < 0.97


def test_a_text_ends_where_no_tokenizer_has_read_too_much(smollm2: Path, qwen: Path) -> None:
    tokenizers = [open_tokenizer(smollm2), open_tokenizer(qwen)]
    texts = [*PASSAGES, "def f(x):\n    return x  # naïve " * 20, "short"]
    cut = common_beginnings(texts, tokenizers, SHORT)
    assert cut[-1] == "short"
    for text, whole in zip(cut[:-1], texts, strict=False):
        assert whole.startswith(text)
        lengths = [len(tokenizer.encode(text, start=True)) for tokenizer in tokenizers]
        assert SHORT - 6 <= max(lengths) <= SHORT


def test_speed_is_the_median_of_rounds(engine: Engine, tiny: Path) -> None:
    ticks = count()
    even = speed(engine, [1, 2, 3], lambda: float(next(ticks)), 2)  # whatever is timed takes a second
    length = engine.context - WRITTEN
    assert (even.decode_tok_s, even.prefill_tok_s, even.first_token_ms) == (WRITTEN, length, 1000)

    wide = GgufEngine(tiny, context=512, sequences=1, threads=1, hidden=False)
    # Of each round: the question begins and ends, the prompt begins and ends, and the last token is there.
    rounds = [(0, 1, 1, 3, 7), (10, 13, 13, 14, 24), (30, 32, 32, 35, 36)]
    times = iter([0.0, 0.0, 0.0, *(float(time) for one in rounds for time in one)])
    assert speed(wide, [1, 2, 3], lambda: next(times), 3) == type(even)(WRITTEN / 4, READ / 2, 2000)
    wide.close()
    assert ASKED < READ


@pytest.fixture(scope="module")
def against_q2(smollm2: Path, smollm2_q2: Path, cache: Path) -> Comparison:
    found = run(smollm2, smollm2_q2, cache, TOKENS)
    assert not list(cache.iterdir())  # what the models said is gone
    return found


def test_fewer_bits_are_smaller_and_worse(against_q2: Comparison, smollm2: Path, smollm2_q2: Path) -> None:
    found, close = against_q2, against_q2.close
    assert close is not None
    assert (found.first.bytes, found.second.bytes) == (smollm2.stat().st_size, smollm2_q2.stat().st_size)
    assert (found.first.quantisation, found.second.quantisation) == ("Q4_1", "Q2_K")
    assert found.second.perplexity > 1.1 * found.first.perplexity
    assert found.second.bits_per_byte > found.first.bits_per_byte
    assert close.perplexity_ratio.value == pytest.approx(found.second.perplexity / found.first.perplexity)
    ratio = close.perplexity_ratio
    assert 1 < ratio.low < ratio.value < ratio.high
    assert 0.3 < close.agreement.value < 0.9
    assert 0.1 < close.kl.low < close.kl.value < close.kl.high


def test_what_is_measured_of_each_model(against_q2: Comparison, smollm2: Path) -> None:
    one = against_q2.first
    low, high = one.perplexity_95
    assert 5 < low < one.perplexity < high < 300
    read = [open_tokenizer(smollm2).encode(text, start=True)[:TOKENS] for text in PASSAGES]
    text = sum(len(open_tokenizer(smollm2).decode(tokens[1:])) for tokens in read)
    assert one.bits_per_byte == pytest.approx(math.log2(one.perplexity) * one.tokens / text)
    assert min(one.decode_tok_s, one.prefill_tok_s, one.first_token_ms) > 0
    assert 100 < one.rss_mb < 1000  # the model has 98 MB
    assert one.tokens == len(PASSAGES) * (TOKENS - 1)
    assert one.vocabulary == open_tokenizer(smollm2).fingerprint


def test_one_model_in_two_runtimes(smollm2: Path, smollm2_onnx: Path, cache: Path) -> None:
    found = run(smollm2, smollm2_onnx, cache, SHORT)
    assert (found.first.engine, found.second.engine) == ("gguf", "onnx")
    assert found.second.bytes > 4 * found.first.bytes  # float32
    assert found.close is not None
    # llama.cpp rounds what goes into each product to 8 bits.
    assert found.close.agreement.value > 0.85
    assert found.close.kl.value < 0.02
    assert found.close.perplexity_ratio.value == pytest.approx(1, abs=0.05)


def test_one_model_alone(tmp_path: Path, smollm2_q2: Path, against_q2: Comparison) -> None:
    lines: list[str] = []
    alone = measure(smollm2_q2, PASSAGES, tokens=TOKENS, threads=1, env=os.environ, say=lines.append, rounds=1)
    assert alone.perplexity == against_q2.second.perplexity
    assert lines[0] == f"measuring {smollm2_q2} …"


def test_what_cannot_be_measured_is_refused_before_anything_runs(
    smollm2: Path, tiny: Path, tmp_path: Path, cache: Path
) -> None:
    def never(line: str) -> None:
        raise AssertionError(line)

    job = Job(os.environ, never)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:60_000_000])
    with pytest.raises(BadModelFile, match=r"cut\.gguf"):
        run(smollm2, cut, cache, SHORT, job)
    with pytest.raises(BadModelFile, match="no tokenizer"):
        run(smollm2, tiny, cache, SHORT, job)
    with pytest.raises(DiskFull, match="GB are free"):
        run(smollm2, smollm2, cache, SHORT, Job(os.environ, never, free_space=lambda folder: 1000))
    with pytest.raises(ConfigError, match="too little text"):
        compare(smollm2, smollm2, ["", "Hi"], cache, tokens=8, threads=1, rounds=1, job=job)
    assert not list(cache.iterdir())


def test_a_model_that_gives_no_numbers(smollm2_q2: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copy(smollm2_q2, tmp_path / "broken.gguf"))
    reader = gguf.GGUFReader(broken, "r+")
    (norm,) = (tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[:] = np.nan
    reader.data.flush()
    with pytest.raises(WorkshopError, match=r"broken\.gguf: gives numbers that are not finite"):
        measure(broken, PASSAGES[:1], tokens=8, threads=1, env=os.environ, say=lambda line: None, rounds=1)


def test_a_measurement_that_is_killed(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with pytest.raises(WorkshopError, match=r"measuring .*gguf: the system ended it, most likely for its memory"):
        run(smollm2, smollm2, tmp_path / "cache", SHORT, Job(env))
    assert not list((tmp_path / "cache").iterdir())


def test_what_the_engine_says_comes_back_without_a_traceback(smollm2: Path, tmp_path: Path) -> None:
    asked = Asked(here(tmp_path / "gone.gguf"), [[1, 2, 3]], 1, 1, keep=False)
    with pytest.raises(WorkshopError, match=r"gone\.gguf: cannot be read: No such file") as caught:
        measure_in(tmp_path, look_into(smollm2), asked, Job(os.environ))
    assert "Traceback" not in str(caught.value)
