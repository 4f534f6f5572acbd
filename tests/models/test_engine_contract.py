"""What every Engine must do (models/engine/base.py). A new backend is one more entry in MODELS."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.chat import render
from models.engine.base import Engine, Step, Tokenizer
from models.engine.base import Sequence as Place
from models.engine.gguf import GgufTokenizer
from models.engine.open import EngineOptions, open_tokenizer
from models.engine.open import open_engine as engine_of
from models.fingerprint import fingerprint
from protocol.errors import BadModelFile, ContextFull, Overloaded
from protocol.resolve import Message

# Fixtures with the same weights: for llama.cpp, and as both exporters write them for onnxruntime.
MODELS = ["smollm2", "smollm2_onnx", "smollm2_optimum"]
CONTEXT = 320  # a little more than one pass of prefill takes
SEQUENCES = 3
# Logits are about 20 large. Passes of other shapes may sum in another order; within one shape there is no difference.
TOLERANCE = 1e-2

Open = Callable[..., Engine]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def open_engine(model: Path) -> Open:
    """Opens an engine on the model, with the options that are given."""

    def build(path: Path = model, **options: Any) -> Engine:
        settings: dict[str, Any] = {"context": CONTEXT, "sequences": SEQUENCES, "threads": 1}
        return engine_of(path, EngineOptions(**(settings | options)))

    return build


@pytest.fixture(scope="module")
def engine(open_engine: Open) -> Iterator[Engine]:
    engine = open_engine()
    yield engine
    engine.close()


@pytest.fixture
def places(engine: Engine) -> Iterator[Callable[[Sequence[int], int], Place]]:
    """Opens places that are given back, and forgotten, at the end of the test."""
    opened: list[Place] = []

    def take(prompt: Sequence[int], reserve: int = 32) -> Place:
        opened.append(engine.open(prompt, reserve))
        return opened[-1]

    yield take
    for place in opened:
        place.rewind(0)
        place.close()


def logits_of(engine: Engine, place: Place, tokens: Sequence[int]) -> NDArray[np.float32]:
    (step,) = engine.forward([(place, tokens)])
    return step.logits.copy()


def greedy(engine: Engine, place: Place, prompt: Sequence[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """The `count` likeliest tokens after `prompt` and the logits that they come from."""
    tokens: list[int] = []
    logits = [logits_of(engine, place, prompt)]
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits.append(logits_of(engine, place, tokens[-1:]))
    return tokens, logits


def address(step: Step) -> tuple[int, int]:
    assert step.hidden is not None
    return step.logits.ctypes.data, step.hidden.ctypes.data


FRANCE = "The capital of France is a city that"
STORY = "Once upon a time there was a small"


class TestTokenizer:
    @pytest.mark.parametrize(
        "text",
        ["", " ", "plain words", "  two  spaces\n\n\ttab", "naïve 日本語", "👨‍👩‍👧 family 😀", "a\x00b", "🇩🇪" * 20],
    )
    def test_text_survives_the_round_trip(self, engine: Engine, text: str) -> None:
        tokenizer = engine.tokenizer
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
        assert tokenizer.encode(text.encode()) == tokenizer.encode(text)

    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(min_codepoint=32, max_codepoint=0x3FFFF, exclude_categories=["Cs"]), max_size=60))
    def test_any_text_survives_the_round_trip(self, engine: Engine, text: str) -> None:
        assert engine.tokenizer.decode(engine.tokenizer.encode(text)) == text.encode()

    def test_half_a_character_keeps_its_bytes(self, engine: Engine) -> None:
        for raw in (b"\xf0\x9f", b"\x98\x80", b"caf\xc3", b"a \xf0\x9f\x98 b", "é😀".encode()[1:-1]):
            assert engine.tokenizer.decode(engine.tokenizer.encode(raw)) == raw

    def test_bytes_without_a_token_are_left_out(self, engine: Engine) -> None:
        tokenizer = engine.tokenizer
        known = {tokenizer.piece(token) for token in range(tokenizer.vocab)}
        raw = bytes(range(128, 256))
        assert tokenizer.decode(tokenizer.encode(raw)) == bytes(byte for byte in raw if bytes([byte]) in known)

    def test_a_long_run_of_broken_bytes_is_read_quickly(self, engine: Engine) -> None:
        assert len(engine.tokenizer.encode(b"\x80" * 200_000)) == 200_000

    def test_tokens_are_in_the_vocabulary(self, engine: Engine) -> None:
        assert engine.tokenizer.vocab == engine.info.vocab
        assert all(0 <= token < engine.info.vocab for token in engine.tokenizer.encode("any words, 1234 😀"))

    def test_control_tokens_are_read_only_when_asked_for(self, engine: Engine) -> None:
        tokenizer = engine.tokenizer
        end = tokenizer.control(tokenizer.end_id)
        assert tokenizer.encode(end, special=True) == [tokenizer.end_id]
        assert tokenizer.end_id not in tokenizer.encode(end)
        assert tokenizer.decode(tokenizer.encode(end)) == end.encode()

    def test_the_end_token_ends_a_generation_and_has_no_text(self, engine: Engine) -> None:
        tokenizer = engine.tokenizer
        assert tokenizer.end_id in tokenizer.eog
        assert tokenizer.piece(tokenizer.end_id) == b""
        assert tokenizer.end == tokenizer.control(tokenizer.end_id) != ""

    def test_the_chat_template_ends_where_the_answer_begins(self, engine: Engine) -> None:
        text = render(engine.tokenizer, [Message("system", "Be brief."), Message("user", "Why is the sky blue? 😀")])
        assert text.index("Be brief.") < text.index("Why is the sky blue? 😀") < text.rindex("assistant")
        tokens = engine.tokenizer.encode(text, special=True)
        assert engine.tokenizer.encode("<|im_start|>", special=True)[0] in tokens

    def test_fingerprint_is_the_vocabularys(self, engine: Engine, open_engine: Open) -> None:
        again = open_engine(context=128)
        assert again.tokenizer.fingerprint == engine.tokenizer.fingerprint
        again.close()

    def test_fingerprint_differs_where_one_token_differs(self, smollm2: Path, tmp_path: Path) -> None:
        raw = smollm2.read_bytes()
        word = len("Ġwonder".encode()).to_bytes(8, "little") + "Ġwonder".encode()
        assert raw.count(word) == 1
        other = tmp_path / "other.gguf"
        other.write_bytes(raw.replace(word, word[:-1] + b"x"))
        fingerprints = [GgufTokenizer.open(path).fingerprint for path in (smollm2, other)]
        assert fingerprints[0] != fingerprints[1]


class TestForward:
    def test_gives_logits_and_hidden_state(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        (step,) = engine.forward([(places(prompt), prompt)])
        assert step.logits.shape == (engine.info.vocab,)
        assert step.logits.dtype == np.float32
        assert step.hidden is not None
        assert step.hidden.shape == (engine.info.width,)
        assert step.hidden.dtype == np.float32
        assert np.isfinite(step.logits).all()
        assert np.isfinite(step.hidden).all()
        assert np.abs(step.hidden).max() > 0.0

    def test_steps_are_views_of_the_same_memory(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        place = places(prompt)
        engine.forward([(place, prompt)])
        (first,) = engine.forward([(place, prompt[:1])])
        before = first.logits.copy()
        (second,) = engine.forward([(place, prompt[1:2])])
        assert address(first) == address(second)
        assert not first.logits.flags.owndata
        assert np.shares_memory(first.logits, second.logits)
        assert not np.array_equal(before, first.logits)

    def test_without_hidden_states_the_logits_are_the_same(
        self, engine: Engine, open_engine: Open, places: Callable[..., Place]
    ) -> None:
        prompt = (engine.tokenizer.encode(FRANCE) * CONTEXT)[:270]  # more than one pass
        plain = open_engine(hidden=False)
        (step,) = plain.forward([(plain.open(prompt, 8), prompt)])
        assert step.hidden is None
        np.testing.assert_allclose(step.logits, logits_of(engine, places(prompt), prompt), atol=TOLERANCE)
        plain.close()

    def test_all_at_once_equals_token_by_token(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        at_once = logits_of(engine, places(prompt), prompt)
        place = places(prompt)
        place.rewind(0)
        for token in prompt:
            one_by_one = logits_of(engine, place, [token])
        np.testing.assert_allclose(one_by_one, at_once, atol=TOLERANCE)

    def test_rewinding_gives_the_same_logits_again(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        place = places(prompt)
        tokens, logits = greedy(engine, place, prompt, 6)
        for position in (4, 0, 2):
            place.rewind(len(prompt) + position)
            assert place.tokens == prompt + tokens[:position]
            for at in range(position, 6):
                np.testing.assert_allclose(logits_of(engine, place, [tokens[at]]), logits[at + 1], atol=TOLERANCE)

    def test_what_was_rewound_leaves_no_trace(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        place = places(prompt)
        tokens, logits = greedy(engine, place, prompt, 2)
        place.rewind(len(prompt))
        engine.forward([(place, engine.tokenizer.encode(" banana banana banana"))])
        place.rewind(len(prompt))
        np.testing.assert_allclose(logits_of(engine, place, tokens[:1]), logits[1], atol=TOLERANCE)

    def test_rewinding_beyond_the_end_is_nothing(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        place = places(prompt)
        engine.forward([(place, prompt)])
        place.rewind(len(prompt) + 5)
        assert place.tokens == prompt

    def test_interleaved_sequences_equal_each_alone(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompts = [engine.tokenizer.encode(text) for text in (FRANCE, STORY)]
        alone = []
        for prompt in prompts:
            place = places(prompt)
            alone.append(greedy(engine, place, prompt, 5))
            place.rewind(0)
            place.close()
        both = [places(prompt) for prompt in prompts]
        for place, prompt, (_, logits) in zip(both, prompts, alone, strict=True):
            np.testing.assert_allclose(logits_of(engine, place, prompt), logits[0], atol=TOLERANCE)
        for at in range(5):
            for place, (tokens, logits) in zip(both, alone, strict=True):
                np.testing.assert_allclose(logits_of(engine, place, [tokens[at]]), logits[at + 1], atol=TOLERANCE)

    def test_one_pass_for_several_equals_single_ones(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompts = [engine.tokenizer.encode(text) for text in (FRANCE, STORY * 3, "Hi")]
        alone = []
        for prompt in prompts:
            place = places(prompt)
            (step,) = engine.forward([(place, prompt)])
            assert step.hidden is not None
            alone.append((step.logits.copy(), step.hidden.copy()))
            place.rewind(0)
            place.close()
        steps = engine.forward([(places(prompt), prompt) for prompt in prompts])
        for step, (logits, hidden) in zip(steps, alone, strict=True):
            np.testing.assert_allclose(step.logits, logits, atol=TOLERANCE)
            np.testing.assert_allclose(step.hidden, hidden, atol=TOLERANCE)

    def test_a_prompt_in_slices_equals_one_feed(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = (engine.tokenizer.encode(FRANCE) * CONTEXT)[:150]
        place = places(prompt)
        whole = logits_of(engine, place, prompt)
        place.rewind(0)
        for at in range(0, len(prompt), 64):
            sliced = logits_of(engine, place, prompt[at : at + 64])
        np.testing.assert_allclose(sliced, whole, atol=TOLERANCE)


class TestPlaces:
    def test_a_second_request_feeds_only_what_is_new(self, engine: Engine, places: Callable[..., Place]) -> None:
        first = engine.tokenizer.encode(FRANCE)
        second = first[:6] + engine.tokenizer.encode(" many people visit")
        place = places(first)
        fresh = logits_of(engine, place, second)
        place.rewind(0)
        engine.forward([(place, first)])
        place.close()
        again = places(second)
        missing = again.align(second)
        assert missing == second[6:]
        np.testing.assert_allclose(logits_of(engine, again, missing), fresh, atol=TOLERANCE)

    def test_the_same_request_again_feeds_one_token(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        place = places(prompt)
        tokens, logits = greedy(engine, place, prompt, 4)
        place.close()
        again = places(prompt)
        assert again.align(prompt) == prompt[-1:]
        np.testing.assert_allclose(logits_of(engine, again, prompt[-1:]), logits[0], atol=TOLERANCE)
        assert again.align(prompt + tokens) == tokens

    def test_the_place_with_the_longest_prefix_is_taken(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompts = [engine.tokenizer.encode(text) for text in (STORY, FRANCE, "Hi")]
        for place, prompt in [(places(prompt), prompt) for prompt in prompts]:
            engine.forward([(place, prompt)])
            place.close()
        place = places(prompts[1])
        assert place.align(prompts[1]) == prompts[1][-1:]

    def test_more_than_was_reserved_is_context_full(self, engine: Engine, places: Callable[..., Place]) -> None:
        prompt = engine.tokenizer.encode(FRANCE)
        place = places(prompt, 2)
        engine.forward([(place, prompt)])
        engine.forward([(place, prompt[:2])])
        with pytest.raises(ContextFull):
            engine.forward([(place, prompt[:1])])
        assert place.tokens == prompt + prompt[:2]
        place.rewind(len(prompt))
        engine.forward([(place, prompt[:2])])

    def test_what_can_never_fit_is_context_full(self, engine: Engine) -> None:
        with pytest.raises(ContextFull, match=str(CONTEXT)):
            engine.open([1] * 300, CONTEXT - 299)
        with pytest.raises(ContextFull):
            engine.check_fits(CONTEXT, 1)
        engine.check_fits(CONTEXT - 1, 1)

    def test_the_whole_context_can_be_used(self, engine: Engine, places: Callable[..., Place]) -> None:
        tokens = (engine.tokenizer.encode(STORY) * CONTEXT)[:CONTEXT]
        place = places(tokens[:-1], 1)
        engine.forward([(place, tokens)])
        with pytest.raises(ContextFull):
            engine.forward([(place, tokens[:1])])

    def test_no_place_left_is_overloaded(self, engine: Engine, places: Callable[..., Place]) -> None:
        for _ in range(SEQUENCES):
            places([1, 2, 3], 4)
        with pytest.raises(Overloaded) as caught:
            places([1, 2, 3], 4)
        assert caught.value.retry_after > 0.0

    def test_cells_promised_to_others_are_overloaded(self, engine: Engine, places: Callable[..., Place]) -> None:
        first = places([1, 2, 3], 200)
        with pytest.raises(Overloaded):
            places([1, 2, 3], 150)
        first.close()
        places([1, 2, 3], 150)

    def test_idle_caches_make_room(self, engine: Engine, places: Callable[..., Place]) -> None:
        words = engine.tokenizer.encode(STORY)
        long = (words * CONTEXT)[:180]
        idle = places(long, 0)
        engine.forward([(idle, long)])
        idle.close()
        other = (engine.tokenizer.encode(FRANCE) * CONTEXT)[:180]
        place = places(other, 40)
        engine.forward([(place, place.align(other))])  # 180 + 180 cells are more than there are
        assert place.tokens == other

    def test_idle_caches_that_fit_are_kept(self, engine: Engine, places: Callable[..., Place]) -> None:
        first, second = engine.tokenizer.encode(FRANCE), engine.tokenizer.encode(STORY)
        place = places(first)
        engine.forward([(place, first)])
        place.close()
        other = places(second)
        engine.forward([(other, second)])
        again = places(first)
        assert len(again.align(first)) == 1


class TestFiles:
    def test_info_is_the_files(self, engine: Engine, model: Path) -> None:
        assert engine.info.fingerprint == fingerprint(model)
        assert (engine.info.vocab, engine.info.width, engine.info.context) == (49_152, 576, CONTEXT)
        assert engine.info.architecture == "llama"

    def test_context_is_at_most_what_the_model_was_trained_for(self, open_engine: Open) -> None:
        engine = open_engine(context=1 << 20, sequences=1)
        assert engine.context == engine.info.context == 8192
        engine.close()

    @pytest.mark.parametrize("damage", ["absent", "folder", "empty", "text", "head", "tail"])
    def test_a_bad_file_is_said_to_be_one(self, open_engine: Open, model: Path, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "model"
        if model.is_dir():
            shutil.copytree(model, path, ignore=shutil.ignore_patterns("*.data"))
        weights = path / "model.onnx" if model.is_dir() else path
        original = model / "model.onnx" if model.is_dir() else model
        weights.unlink(missing_ok=True)
        match damage:
            case "folder":
                weights.mkdir()
            case "empty":
                weights.touch()
            case "text":
                weights.write_text("<html>404 not found</html>")
            case "head":
                with original.open("rb") as file:
                    weights.write_bytes(file.read(100_000))
            case "tail":
                shutil.copyfile(original, weights)
                with weights.open("r+b") as file:
                    file.truncate(original.stat().st_size - 100_000)
        with pytest.raises(BadModelFile, match=str(path)):
            open_engine(path)


def test_tokenizer_of_the_file_alone(engine: Engine, model: Path) -> None:
    alone: Tokenizer = open_tokenizer(model)
    assert alone.fingerprint == engine.tokenizer.fingerprint
    assert alone.encode(FRANCE) == engine.tokenizer.encode(FRANCE)


def test_the_same_vocabulary_in_every_format(engine: Engine, smollm2: Path) -> None:
    """What lets a device with one format use logits and memory entries of one with another."""
    original, tokenizer = GgufTokenizer.open(smollm2), engine.tokenizer
    assert tokenizer.fingerprint == original.fingerprint
    assert (tokenizer.eog, tokenizer.end_id, tokenizer.controls) == (original.eog, original.end_id, original.controls)
    assert (tokenizer.begin, tokenizer.end, tokenizer.template) == (original.begin, original.end, original.template)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_texts_have_the_same_tokens_in_every_format(engine: Engine, smollm2: Path, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    tokens = _original(smollm2).encode(text)
    assume(_original(smollm2).decode(tokens) == text.encode())
    assert engine.tokenizer.encode(text) == tokens


@lru_cache
def _original(path: Path) -> Tokenizer:
    return GgufTokenizer.open(path)
