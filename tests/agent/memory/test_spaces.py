"""Each adapter has a space of its own: keys, evidence, and what it announces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.chain import Chain
from agent.memory import key as keys_module
from agent.memory.keeper import Keeper
from agent.memory.key import KeyMaker, keys_beside, prepare_keys, space_of
from agent.resolver import Question, Reply
from models.adapter import Adapter, Factors, write
from models.engine.gguf import GgufEngine
from protocol.transport.bus import Bus
from tests.agent.chains import WIDTH, Case, cloud, hidden, opened, step
from tests.agent.peers.devices import Device, acquainted, eventually
from tests.protocol.entries import SPACE

MODEL = "ab" * 32
HOUSE, GARDEN = "11" * 32, "22" * 32  # adapters
OTHER = b"an adapter's own"


@pytest.fixture
def served(keeper: Keeper, tmp_path: Path) -> dict[str, Path]:
    """Two adapters whose keys are prepared."""
    files = {id: tmp_path / "adapters" / f"{id}.gguf" for id in (HOUSE, GARDEN)}
    for id, path in files.items():
        maker = KeyMaker(space_of(MODEL, id), np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
        maker.save(keys_beside(path))
    keeper.follow(MODEL, files)
    return files


def asked(case: Case, adapter: str | None) -> Question:
    question = case.question()
    assert question.state is not None
    return replace(question, state=None if adapter is None else replace(question.state, adapter=adapter))


def learn(keeper: Keeper, case: Case, adapter: str | None) -> None:
    step(opened(Chain(keeper, cloud=cloud(lambda question: case.truth))), asked(case, adapter))


def recalled(keeper: Keeper, case: Case, adapter: str | None) -> Reply | None:
    ticket = opened(Chain(keeper)).known(asked(case, adapter))
    return None if ticket is None else ticket.reply


@pytest.mark.parametrize("writer", ["", HOUSE, GARDEN])
def test_what_one_learned_the_others_do_not_know(keeper: Keeper, served: dict[str, Path], writer: str) -> None:
    case = Case(hidden(1))
    learn(keeper, case, writer)
    for reader in ("", HOUSE, GARDEN):
        reply = recalled(keeper, case, reader)
        assert (reply is not None) == (reader == writer)
        assert reply is None or reply.tokens[0] == case.truth


@pytest.mark.parametrize("adapter", [None, "33" * 32])
def test_a_mix_and_an_adapter_without_keys_have_no_memory(
    keeper: Keeper, served: dict[str, Path], adapter: str | None
) -> None:
    learn(keeper, Case(hidden(1)), adapter)
    assert recalled(keeper, Case(hidden(1)), adapter) is None
    assert keeper.counts["lookups"] == 0
    assert keeper.memory.stats().entries == 0


def test_each_has_seen_its_own_hits_alone(keeper: Keeper, served: dict[str, Path]) -> None:
    case = Case(hidden(1), draft=7)
    for _ in range(3):
        step(opened(Chain(keeper, cloud=cloud(lambda question: 9))), asked(case, HOUSE))
    before = keeper.evidence.to_bytes()
    keeper.save()
    assert served[HOUSE].with_suffix(".evidence").exists()
    assert not served[GARDEN].with_suffix(".evidence").exists()
    assert keeper.evidence.to_bytes() == before


def test_who_is_given_up_and_comes_back_knows_what_it_knew(keeper: Keeper, served: dict[str, Path]) -> None:
    case = Case(hidden(1))
    learn(keeper, case, HOUSE)
    learn(keeper, Case(hidden(1), truth=9), HOUSE)
    space = space_of(MODEL, HOUSE)
    keeper.follow(MODEL, {GARDEN: served[GARDEN]})
    assert space not in keeper.spaces
    assert recalled(keeper, case, HOUSE) is None
    assert served[HOUSE].with_suffix(".evidence").exists()
    keeper.follow(MODEL, served)
    assert keeper.spaces == [keeper.keys.space, space, space_of(MODEL, GARDEN)]
    look = keeper.look(asked(case, HOUSE), "take")
    assert look is not None
    assert look.candidate is not None


def test_keys_of_another_model_or_a_damaged_file_are_not_used(keeper: Keeper, served: dict[str, Path]) -> None:
    keeper.follow("cd" * 32, {})
    keeper.follow("cd" * 32, served)
    assert keeper.spaces == [keeper.keys.space]
    keys_beside(served[HOUSE]).write_bytes(b"skerry-key-1\n")
    keeper.follow(MODEL, served)
    assert keeper.spaces == [keeper.keys.space, space_of(MODEL, GARDEN)]


def test_keys_are_made_by_the_model_with_the_adapter(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "CALIBRATION", ("The ferry leaves at seven.",))
    engine = GgufEngine(smollm2, context=64, sequences=1, threads=1)
    try:
        path = strong_file(tmp_path, engine)
        id = engine.attach(path)
        prepare_keys(engine, id, path)
        bare = KeyMaker.calibrate(engine)
        made = KeyMaker.load(keys_beside(path), space_of(engine.info.fingerprint, id), engine.info.width)
        assert made is not None
        state = np.random.default_rng(0).normal(size=engine.info.width).astype(np.float32)
        assert not np.allclose(made.standardise(state), bare.standardise(state), atol=1e-3)
        assert engine.free == 1
    finally:
        engine.close()


def strong_file(folder: Path, engine: GgufEngine) -> Path:
    random = np.random.default_rng(3)
    shape = (4, engine.info.width)
    factors = Factors(
        random.normal(0.0, 0.2, shape).astype(np.float32), random.normal(0.0, 0.2, shape[::-1]).astype(np.float32)
    )
    path = folder / "strong.gguf"
    write(Adapter(engine.info.fingerprint, engine.info.architecture, 4.0, {"blk.20.attn_q": factors}), path)
    return path


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Device]]:
    bus = Bus()
    with ExitStack() as stack:
        stack.callback(bus.close)
        numbers = iter(range(1, 100))
        yield lambda name: stack.enter_context(Device(tmp_path, name, next(numbers), bus=bus))


def test_an_adapter_that_comes_into_use_is_announced_and_heard_of(make: Callable[..., Device]) -> None:
    lamp, fridge = make("lamp"), make("fridge")
    acquainted(lamp, fridge)
    fridge.network.use([SPACE, OTHER])
    eventually(lambda: bool(lamp.network.around.holders(OTHER)))
    assert fridge.network.intake.spaces == {SPACE, OTHER}
    fridge.network.use([SPACE])
    eventually(lambda: not lamp.network.around.holders(OTHER))
    lamp.learn(1)
    eventually(lambda: fridge.knows(1))
