"""How fast a device writes, by length of context (models/latency.py)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import latency
from models.engine.base import Engine, ModelInfo, Sequence, Step
from models.engine.open import EngineOptions, open_engine, open_tokenizer
from models.latency import STEPS, DecodePoint, DecodeTable
from protocol.errors import StoreError

MODEL = "a" * 64
READ, STEP, CELL = 0.01, 0.1, 0.001  # seconds: of a token that is read, of a step, of each token before it


class Slow(Engine):
    """An engine whose steps take the time that they say, on a clock that only they move."""

    def __init__(self, path: Path, context: int) -> None:
        super().__init__(sequences=1, context=context)
        self.info = ModelInfo("slow", MODEL, "none", 8, 4, context)
        self.tokenizer = open_tokenizer(path)
        self.now = 0.0
        self.fed = 0
        self.disturbed = 0  # this many of the next steps take a hundred times as long

    @property
    def threads(self) -> int:
        return 1

    def forward(self, feeds: Seq[tuple[Sequence, Seq[int]]]) -> list[Step]:
        ((sequence, tokens),) = feeds
        self._check_room(sequence, len(tokens))
        self.fed += len(tokens)
        if len(tokens) > 1:
            self.now += READ * len(tokens)
        else:
            self.now += (STEP + CELL * len(sequence.tokens)) * (100 if self.disturbed > 0 else 1)
            self.disturbed -= 1
        sequence.tokens.extend(tokens)
        return [Step(np.zeros(8, np.float32), None)]

    def _trim(self, id: int, position: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def slow(smollm2: Path) -> Slow:
    return Slow(smollm2, context=1024)


def table(*points: tuple[int, float]) -> DecodeTable:
    """Points: length of context, seconds of a step."""
    measured = tuple(DecodePoint(length, 1 / seconds, 100.0) for length, seconds in points)
    return DecodeTable(MODEL, "gguf", latency.processor(), 2, measured, 0.0)


def measured(engine: Slow, lengths: list[int], patience: float = 1e9) -> tuple[DecodePoint, ...]:
    return latency.measure(engine, lengths, lambda: engine.now, lambda point: None, patience)


def test_steps_and_reading_are_timed_at_each_length(slow: Slow) -> None:
    told: list[DecodePoint] = []
    points = latency.measure(slow, [64, 256, 512], lambda: slow.now, told.append)
    assert [point.context for point in points] == [64, 256, 512]
    assert told == list(points)
    for point in points:
        middle = point.context + (STEPS - 1) / 2  # the steps themselves lengthen the context
        assert 1 / point.decode_tok_s == pytest.approx(STEP + CELL * middle)
        assert point.prefill_tok_s == pytest.approx(1 / READ)


def test_nothing_is_read_twice_and_the_place_is_given_back(slow: Slow) -> None:
    measured(slow, [64, 256, 512])
    assert slow.fed == 64 + 512 + 4 * STEPS, "the first length twice, to warm up"
    assert slow.free == 1


def test_a_disturbance_does_not_count(slow: Slow) -> None:
    quiet = measured(slow, [64])
    slow.disturbed = STEPS + STEPS // 2 - 1  # all of the warm-up, and less than half of what counts
    assert measured(slow, [64])[0].decode_tok_s == pytest.approx(quiet[0].decode_tok_s, rel=0.1)


def test_lengths_that_would_take_too_long_are_left_out(slow: Slow) -> None:
    assert [point.context for point in measured(slow, [64, 128, 900], patience=12.0)] == [64, 128]
    assert [point.context for point in measured(slow, [64, 128, 900], patience=0.0)] == [64], "one is always measured"


@pytest.mark.parametrize("context", [1, 16, 17, 128, 256, 4096, 5000])
def test_lengths_grow_up_to_the_context_and_leave_room_for_the_steps(context: int) -> None:
    found = latency.lengths(context)
    assert found == sorted(set(found))
    assert found[-1] == max(1, context - STEPS)


def test_a_real_model_is_measured(smollm2: Path) -> None:
    engine = open_engine(smollm2, EngineOptions(context=64, sequences=1, threads=1, hidden=False))
    try:
        ticks = count()
        points = latency.measure(engine, [8, 24], lambda: float(next(ticks)), lambda point: None)
        assert points == (DecodePoint(8, 1.0, 8.0), DecodePoint(24, 1.0, 16.0))
        assert engine.free == 1
    finally:
        engine.close()


def test_between_and_beyond_what_was_measured_lie_lines() -> None:
    known = table((100, 0.1), (300, 0.2))
    assert known.seconds(100) == pytest.approx(0.1)
    assert known.seconds(200) == pytest.approx(0.15)
    assert known.tok_s(200) == pytest.approx(1 / 0.15)
    assert known.seconds(500) == pytest.approx(0.3)
    assert known.seconds(1) == pytest.approx(0.1)
    assert table((100, 0.1)).seconds(5000) == pytest.approx(0.1)
    assert table((100, 0.2), (300, 0.1)).seconds(5000) == pytest.approx(0.1), "noise does not make it faster and faster"


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-4, 10)), min_size=1, max_size=5), st.integers(0, 1 << 20))
def test_a_token_always_takes_time(points: list[tuple[int, float]], context: int) -> None:
    least = min(seconds for _, seconds in points)
    assert table(*points).seconds(context) >= least * 0.999


def test_a_table_is_kept_for_this_model_and_machine(tmp_path: Path) -> None:
    folder = tmp_path / "device"
    kept = table((64, 0.05), (256, 0.06))
    path = latency.save(folder, kept)
    assert path.name == f"latency-{'a' * 16}.json"
    assert list(folder.iterdir()) == [path]
    assert latency.load(folder, MODEL, 2) == kept
    assert latency.load(folder, MODEL, 1) is None
    assert latency.load(folder, "b" * 64, 2) is None
    latency.save(folder, msgspec.structs.replace(kept, model="a" * 63 + "b"))
    assert latency.load(folder, MODEL, 2) is None, "only the name is the same"
    latency.save(folder, msgspec.structs.replace(kept, cpu="another machine's"))
    assert latency.load(folder, MODEL, 2) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        msgspec.json.encode(msgspec.structs.replace(table((64, 0.1)), points=())),
        msgspec.json.encode(table((64, 0.1))).replace(b'"decode_tok_s":10.0', b'"decode_tok_s":0'),
        msgspec.json.encode(table((64, 0.1))).replace(b'"decode_tok_s":10.0', b'"decode_tok_s":1e999'),
    ],
)
def test_a_damaged_table_is_as_none(damage: bytes, tmp_path: Path) -> None:
    latency.save(tmp_path, table((64, 0.1))).write_bytes(damage)
    assert latency.load(tmp_path, MODEL, 2) is None


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "device").write_text("a file")
    with pytest.raises(StoreError, match=r"device\.folder"):
        latency.save(tmp_path / "device", table((64, 0.1)))
