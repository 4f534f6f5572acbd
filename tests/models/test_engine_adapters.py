"""What every Engine must do with adapters (models/engine/base.py): the right change, for those who ask for it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import Adapter, Factors, Floats, permute_rows, write
from models.engine.base import WINDOW, Engine, Mix
from models.engine.base import Sequence as Place
from models.engine.gguf import GgufEngine
from protocol.errors import BadAdapter, ContextFull, Overloaded
from tests.models.tiny import LAYERS, SHAPES, TURNED, VOCAB, WIDTH, Tiny

BACKENDS: dict[str, type[Engine]] = {"gguf": GgufEngine}  # that take adapters

CONTEXT = 256
SEQUENCES = 3
PROMPT = [5, 77, 3, 9, 23, 54, 8, 1, 1, 40, 17, 90]
OTHER = [11, 12, 88, 13, 60, 2, 2, 31]

Open = Callable[..., Engine]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny("llama").write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module", params=BACKENDS)
def open_engine(request: pytest.FixtureRequest, tiny: Path) -> Open:
    def build(path: Path = tiny, **options: object) -> Engine:
        settings = {"context": CONTEXT, "sequences": SEQUENCES, "threads": 1, "kv": "f16"} | options
        return BACKENDS[request.param](path, **settings)

    return build


@pytest.fixture
def engine(open_engine: Open) -> Iterator[Engine]:
    engine = open_engine()
    yield engine
    engine.close()


@pytest.fixture
def written(engine: Engine, tmp_path: Path) -> Write:
    """Writes an adapter for the engine's model; `changes` are fields of it."""

    def build(seed: int = 1, names: Sequence[str] = ("attn_q", "attn_v"), **changes: object) -> Path:
        adapter = Adapter(engine.info.fingerprint, "llama", 8.0, llamas(factors(seed, names)))
        path = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}.gguf"
        write(replace(adapter, **changes), path)  # type: ignore[arg-type]
        return path

    return build


def factors(seed: int, names: Sequence[str], rank: int = 4) -> dict[str, Factors]:
    """Of the tiny model's matrices, rows as Hugging Face has them; values that float16 holds."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(LAYERS):
        for name in names:
            d_out, d_in = SHAPES[name]
            a, b = rng.normal(0, d_in**-0.5, (rank, d_in)), rng.normal(0, 0.5, (d_out, rank))
            found[f"blk.{layer}.{name}"] = Factors(*(half.astype(np.float16).astype(np.float32) for half in (a, b)))
    return found


def llamas(named: dict[str, Factors]) -> dict[str, Factors]:
    """The same with the rows as architecture llama's files have them."""
    heads = {name: TURNED.get(name.split(".")[-1]) for name in named}
    return {name: Factors(f.a, permute_rows(f.b, heads[name])) if heads[name] else f for name, f in named.items()}


def read(engine: Engine, mix: Mix = (), tokens: Sequence[int] = PROMPT) -> Floats:
    """(V,) logits after the tokens, on a place of their own."""
    place = engine.open(tokens, 0, mix)
    place.rewind(0)
    (step,) = engine.forward([(place, tokens)])
    logits = step.logits.copy()
    place.rewind(0)
    place.close()
    return logits


def one(id: str, scale: float = 1.0) -> Mix:
    return ((id, scale),)


def differ(a: Floats, b: Floats) -> float:
    """Relative distance."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class TestChange:
    """float16 in the cache and in the adapter leaves some thousandths; a mistake differs by half and more."""

    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    @pytest.mark.parametrize("names", [["attn_q"], ["attn_k"], ["attn_v"], list(SHAPES)], ids=lambda names: names[-1])
    def test_is_that_of_the_weights(
        self, open_engine: Open, tmp_path: Path, architecture: str, names: list[str]
    ) -> None:
        model = Tiny(architecture)
        engine = open_engine(model.write(tmp_path / "model.gguf"))
        assert differ(read(engine), model.logits(PROMPT)) < 0.02
        plain = factors(1, names)
        alpha = 6.0
        named = llamas(plain) if architecture == "llama" else plain
        write(Adapter(engine.info.fingerprint, architecture, alpha, named), tmp_path / "a.gguf")
        for name, pair in plain.items():
            model.weights[name] = model.weights[name] + np.float32(alpha / pair.rank) * (pair.b @ pair.a)
        bare = read(engine)
        changed = read(engine, one(engine.attach(tmp_path / "a.gguf")))
        assert differ(changed, model.logits(PROMPT)) < 0.02
        assert differ(changed, bare) > 0.2
        engine.close()

    def test_is_wrong_with_the_rows_in_another_order(self, engine: Engine, written: Write) -> None:
        named = factors(1, ["attn_q"])
        right, wrong = (read(engine, one(engine.attach(written(factors=f)))) for f in (llamas(named), named))
        assert differ(wrong, right) > 0.2

    def test_grows_with_the_scale(self, engine: Engine, written: Write) -> None:
        full, half = engine.attach(written(alpha=8.0)), engine.attach(written(alpha=4.0))
        assert differ(read(engine, one(full, 0.5)), read(engine, one(half))) < 1e-3
        np.testing.assert_array_equal(read(engine, one(full, 0.0)), read(engine))
        assert differ(read(engine, one(full)), read(engine, one(half))) > 0.1

    def test_of_two_is_their_sum(self, engine: Engine, written: Write) -> None:
        first, second = factors(1, ["attn_v"]), factors(2, ["attn_v"])
        both = {n: Factors(np.vstack([f.a, second[n].a]), np.hstack([f.b, second[n].b])) for n, f in first.items()}
        ids = [engine.attach(written(factors=f, alpha=8.0)) for f in (first, second)]
        sum_of_both = engine.attach(written(factors=both, alpha=16.0))  # of rank 8: alpha / r is the same
        mix = tuple(sorted((id, 1.0) for id in ids))
        assert differ(read(engine, mix), read(engine, one(sum_of_both))) < 5e-3
        assert differ(read(engine, mix), read(engine, one(ids[0]))) > 0.1

    def test_ranks_may_differ_within_an_adapter(self, engine: Engine, written: Write) -> None:
        named = factors(1, ["attn_v"], rank=2)
        named["blk.1.attn_v"] = factors(1, ["attn_v"], rank=7)["blk.1.attn_v"]
        model = Tiny("llama")
        for name, pair in named.items():
            model.weights[name] = model.weights[name] + np.float32(8.0 / pair.rank) * (pair.b @ pair.a)
        assert differ(read(engine, one(engine.attach(written(factors=named)))), model.logits(PROMPT)) < 0.02


class TestAttaching:
    def test_gives_the_id_of_the_file(self, engine: Engine, written: Write, tmp_path: Path) -> None:
        path = written()
        id = engine.attach(path)
        assert engine.attached == {id}
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(path.read_bytes())
        assert engine.attach(copy) == id
        assert engine.attached == {id}

    def test_changes_nothing_by_itself(self, engine: Engine, written: Write) -> None:
        before = read(engine)
        engine.attach(written())
        np.testing.assert_array_equal(read(engine), before)

    def test_what_does_not_fit_is_refused(self, engine: Engine, written: Write, tmp_path: Path) -> None:
        good = written()
        (tmp_path / "short.gguf").write_bytes(good.read_bytes()[:-100])
        narrow = {"blk.0.attn_q": Factors(np.ones((2, 64), np.float32), np.ones((WIDTH, 2), np.float32))}
        bad = [
            (tmp_path / "none.gguf", "cannot be read"),
            (tmp_path / "short.gguf", "bytes where"),
            (written(model="ab" * 32), "another model"),
            (written(architecture="qwen2"), "cannot attach"),
            (written(factors=narrow), r"blk\.0\.attn_q"),
            (written(factors={"blk.7.attn_q": factors(1, ["attn_q"])["blk.0.attn_q"]}), "not there"),
            (written(centroid=np.ones(WIDTH - 1, np.float32)), "centroid"),
        ]
        for path, why in bad:
            with pytest.raises(BadAdapter, match=why):
                engine.attach(path)
        assert not engine.attached
        engine.attach(good)

    def test_what_is_not_attached_cannot_be_used(self, engine: Engine, written: Write) -> None:
        id = engine.attach(written())
        place = engine.open(PROMPT, 8)
        for mix in (one("ab" * 32), one(id, np.nan), (*one(id), ("ab" * 32, 0.5))):
            with pytest.raises(BadAdapter, match="adapter"):
                engine.open(PROMPT, 8, mix)
            with pytest.raises(BadAdapter, match="adapter"):
                place.use(mix)
        assert place.mix == ()
        assert engine.free == SEQUENCES - 1

    def test_a_request_keeps_what_is_detached_to_its_end(self, engine: Engine, written: Write) -> None:
        path = written()
        id = engine.attach(path)
        mix = one(id)
        want = [read(engine, mix), read(engine, mix, [*PROMPT, 7])]
        place = engine.open(PROMPT, 8, mix)
        np.testing.assert_array_equal(engine.forward([(place, PROMPT)])[0].logits, want[0])
        engine.detach(id)
        engine.detach(id)
        assert not engine.attached
        with pytest.raises(BadAdapter):
            engine.open(OTHER, 8, mix)
        place.use(mix)
        assert differ(engine.forward([(place, [7])])[0].logits, want[1]) < 1e-3
        place.close()
        bare = read(engine)
        assert engine.attach(path) == id
        np.testing.assert_array_equal(read(engine, mix), want[0])
        np.testing.assert_array_equal(read(engine), bare)

    def test_attached_again_before_the_request_ends_it_stays(self, engine: Engine, written: Write) -> None:
        path = written()
        id = engine.attach(path)
        place = engine.open(PROMPT, 8, one(id))
        engine.detach(id)
        engine.attach(path)
        place.close()
        assert engine.attached == {id}
        assert differ(read(engine, one(id)), read(engine)) > 0.1

    def test_one_detached_leaves_the_others(self, engine: Engine, written: Write) -> None:
        first, second = (engine.attach(written(seed)) for seed in (1, 2))
        want = read(engine, one(second))
        read(engine, one(first))
        engine.detach(first)
        assert engine.attached == {second}
        np.testing.assert_array_equal(read(engine, one(second)), want)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_a_damaged_file_is_attached_or_refused(
        self, open_engine: Open, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        engine = open_engine()
        path = tmp_path_factory.getbasetemp() / "damaged.gguf"
        write(Adapter(engine.info.fingerprint, "llama", 8.0, factors(1, ["attn_v"], rank=1)), path)
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
        try:
            mix = one(engine.attach(path))
        except BadAdapter:
            mix = ()
        assert read(engine, mix).shape == (VOCAB,)
        engine.close()


class TestMixes:
    def test_requests_do_not_influence_each_other(self, engine: Engine, written: Write) -> None:
        """Each pass has the same shape as alone, so the logits are equal to the bit."""
        ids = [engine.attach(written(seed)) for seed in (1, 2)]
        mixes = [(), one(ids[0]), tuple(sorted([(ids[0], 0.3), (ids[1], 0.7)]))]
        alone = []
        for mix in mixes:
            place = engine.open(PROMPT, 12, mix)
            alone.append([engine.forward([(place, feed)])[0].logits.copy() for feed in (PROMPT, *([t] for t in OTHER))])
            place.rewind(0)
            place.close()
        places = [engine.open(PROMPT, 12, mix) for mix in mixes]
        assert [place.mix for place in places] == mixes
        for at, feed in enumerate((PROMPT, *([t] for t in OTHER))):
            order = np.random.default_rng(at).permutation(len(places))
            steps = engine.forward([(places[index], feed) for index in order])
            for index, step in zip(order, steps, strict=True):
                np.testing.assert_array_equal(step.logits, alone[index][at])

    def test_hidden_states_are_each_ones_own(self, engine: Engine, written: Write) -> None:
        id = engine.attach(written())
        places = [engine.open(PROMPT, 8, mix) for mix in (one(id), (), one(id, 0.5))]
        steps = engine.forward([(place, PROMPT) for place in places])
        seen = [(step.logits.copy(), step.hidden.copy()) for step in steps if step.hidden is not None]
        for place, (logits, hidden) in zip(places, seen, strict=True):
            place.rewind(0)
            (step,) = engine.forward([(place, PROMPT)])
            np.testing.assert_array_equal(step.logits, logits)
            np.testing.assert_array_equal(step.hidden, hidden)
        assert differ(seen[0][1], seen[1][1]) > 0.1
        assert differ(seen[0][1], seen[2][1]) > 0.1

    def test_attaching_and_detaching_disturb_nobody(self, engine: Engine, written: Write) -> None:
        mix = one(engine.attach(written(1)))
        want = []
        for disturbed in (False, True):
            places = [engine.open(PROMPT, 12, one) for one in (mix, ())]
            for at, feed in enumerate((PROMPT, *([t] for t in OTHER))):
                if disturbed and at % 2:
                    engine.attach(written(at))
                elif disturbed:
                    for id in engine.attached - {mix[0][0]}:
                        engine.detach(id)
                steps = [step.logits.copy() for step in engine.forward([(place, feed) for place in places])]
                if not disturbed:
                    want.append(steps)
                else:
                    np.testing.assert_array_equal(steps, want[at])
            for place in places:
                place.rewind(0)
                place.close()

    def test_one_mix_alone_is_shown_without_a_copy(self, engine: Engine, written: Write) -> None:
        mix = one(engine.attach(written()))
        places = [engine.open(PROMPT, 8, mix) for _ in range(2)]
        steps = engine.forward([(place, PROMPT) for place in places])
        assert not any(step.logits.flags.owndata for step in steps)

    def test_rewinding_gives_the_same_logits_again(self, engine: Engine, written: Write) -> None:
        mixes = [one(engine.attach(written())), ()]
        places = [engine.open(PROMPT, 12, mix) for mix in mixes]
        engine.forward([(place, PROMPT) for place in places])
        feeds = [(place, OTHER[:3]) for place in places]
        want = [step.logits.copy() for step in engine.forward(feeds)]
        for place in reversed(places):
            place.rewind(len(PROMPT))
        for step, logits in zip(engine.forward(feeds), want, strict=True):
            np.testing.assert_array_equal(step.logits, logits)

    def test_a_failed_feed_leaves_all_as_they_were(self, engine: Engine, written: Write) -> None:
        mixes = [one(engine.attach(written())), ()]
        places = [engine.open(PROMPT, 1, mix) for mix in mixes]
        engine.forward([(place, PROMPT) for place in places])
        with pytest.raises(ContextFull):
            engine.forward([(places[0], [1]), (places[1], [1, 2])])
        assert [place.tokens for place in places] == [PROMPT, PROMPT]


class TestPlaces:
    def test_a_prefix_is_reused_by_the_same_mix_alone(self, engine: Engine, written: Write) -> None:
        mixes = [(), one(engine.attach(written())), one(engine.attach(written(2)))]
        want = [read(engine, mix) for mix in mixes]
        for mix in mixes:
            place = engine.open(PROMPT, 8, mix)
            assert place.align(PROMPT) == PROMPT
            engine.forward([(place, PROMPT)])
            place.close()
        for mix, logits in zip(mixes, want, strict=True):
            place = engine.open(PROMPT, 8, mix)
            assert place.mix == mix
            assert place.align(PROMPT) == PROMPT[-1:]
            assert differ(engine.forward([(place, PROMPT[-1:])])[0].logits, logits) < 1e-3
            place.close()
        place = engine.open(PROMPT, 8, one(mixes[1][0][0], 0.5))
        assert place.tokens == []

    def test_going_on_with_other_adapters_forgets(self, engine: Engine, written: Write) -> None:
        mix = one(engine.attach(written()))
        place = engine.open(PROMPT, 8)
        engine.forward([(place, PROMPT)])
        place.use(())
        assert place.tokens == PROMPT
        place.use(mix)
        assert (place.tokens, place.mix) == ([], mix)
        np.testing.assert_array_equal(engine.forward([(place, PROMPT)])[0].logits, read(engine, mix))


class TestLastHidden:
    def test_is_the_bare_models(self, engine: Engine, written: Write) -> None:
        mix = one(engine.attach(written()))
        place = engine.open(PROMPT, 8)
        (step,) = engine.forward([(place, PROMPT)])
        assert step.hidden is not None
        want = step.hidden.copy()
        worn = engine.open(PROMPT, 8, mix)
        engine.forward([(worn, PROMPT)])
        np.testing.assert_allclose(engine.last_hidden(PROMPT), want, atol=1e-4)

    def test_is_there_without_hidden_states(self, engine: Engine, open_engine: Open) -> None:
        plain = open_engine(hidden=False)
        np.testing.assert_allclose(plain.last_hidden(PROMPT), engine.last_hidden(PROMPT), atol=1e-4)
        (step,) = plain.forward([(plain.open(PROMPT, 0), PROMPT)])
        assert step.hidden is None
        plain.close()

    def test_takes_no_room_from_requests(self, engine: Engine) -> None:
        place: Place = engine.open([1] * (CONTEXT - 1), 1)
        full = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, CONTEXT)]
        engine.forward([(place, full)])
        for length in (WINDOW, WINDOW - 1, 1):
            assert engine.last_hidden(full[:length]).shape == (WIDTH,)
        with pytest.raises(ContextFull):
            engine.last_hidden([1] * (WINDOW + 1))
        with pytest.raises(Overloaded):
            engine.open([1], 0)
        assert place.tokens == full

    def test_another_prompts_beginning_does_not_matter(self, engine: Engine) -> None:
        want = engine.last_hidden(PROMPT)
        engine.last_hidden(OTHER)
        engine.last_hidden([*PROMPT[:5], *OTHER])
        np.testing.assert_allclose(engine.last_hidden(PROMPT), want, atol=1e-4)
