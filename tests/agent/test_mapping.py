"""From the LLM's bytes to the SLM's tokens, with the real tokenizer of SmolLM2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.mapping import continuation, distribution, first_token
from models.engine.base import Tokenizer
from models.engine.gguf import GgufTokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return GgufTokenizer.open(smollm2)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class TestFirstToken:
    @pytest.mark.parametrize("text", [" Paris", "Paris", "\n\n", " 42", ",", " naïve", "日本", " 😀", "def"])
    def test_lies_along_the_text(self, tokenizer: Tokenizer, text: str) -> None:
        token = first_token(tokenizer, text.encode())
        assert token is not None
        assert tokenizer.piece(token)
        assert text.encode().startswith(tokenizer.piece(token))

    def test_of_a_word_that_it_knows_is_that_word(self, tokenizer: Tokenizer) -> None:
        (paris,) = tokenizer.encode(" Paris")
        assert first_token(tokenizer, b" Paris") == paris

    def test_of_half_a_character_keeps_its_bytes(self, tokenizer: Tokenizer) -> None:
        for raw in ("😀".encode()[:3], "😀".encode()[2:], " é".encode()[:2], b"\x80"):
            token = first_token(tokenizer, raw)
            assert token is not None
            assert raw.startswith(tokenizer.piece(token))

    def test_of_nothing_is_the_end(self, tokenizer: Tokenizer) -> None:
        assert first_token(tokenizer, b"") == tokenizer.end_id

    def test_of_what_no_token_stands_for_is_none(self, tokenizer: Tokenizer) -> None:
        assert first_token(tokenizer, b"\xff") is None

    def test_control_tokens_written_out_are_text(self, tokenizer: Tokenizer) -> None:
        token = first_token(tokenizer, b"<|im_end|>")
        assert token is not None
        assert token not in tokenizer.eog

    @given(st.text(st.characters(min_codepoint=32, max_codepoint=0x3FFFF, exclude_categories=["Cs"]), min_size=1))
    def test_of_any_text_lies_along_it(self, tokenizer: Tokenizer, text: str) -> None:
        token = first_token(tokenizer, text.encode())
        assert token is not None
        assert tokenizer.piece(token)
        assert text.encode().startswith(tokenizer.piece(token))


class TestContinuation:
    def test_leaves_out_what_may_still_grow(self, tokenizer: Tokenizer) -> None:
        text = b" The capital of France is Paris"
        tokens = tokenizer.encode(text)
        assert continuation(tokenizer, text, ended=False) == tokens[:-1]
        assert continuation(tokenizer, text, ended=True) == [*tokens, tokenizer.end_id]

    def test_has_at_least_the_first(self, tokenizer: Tokenizer) -> None:
        assert continuation(tokenizer, b" Paris", ended=False) == tokenizer.encode(" Paris")
        assert continuation(tokenizer, b"", ended=True) == [tokenizer.end_id]

    @pytest.mark.parametrize(
        "text",
        ["The capital of France is Paris, a city.", "naïve café 😀 and 日本語 too", "def add(a, b):\n    return a"],
    )
    def test_grows_along_the_text(self, tokenizer: Tokenizer, text: str) -> None:
        raw = text.encode()
        for end in range(1, len(raw) + 1):
            part = tokenizer.decode(continuation(tokenizer, raw[:end], ended=False))
            assert raw.startswith(part)
            assert part


class TestDistribution:
    def test_pieces_of_one_token_are_added_up(self, tokenizer: Tokenizer) -> None:
        (paris,) = tokenizer.encode(" Paris")
        (lyon,) = tokenizer.encode(" London")
        ids, p, unmatched = distribution(tokenizer, [b" Paris", b" London", b" Paris,"], floats(0.5, 0.2, 0.1))
        assert dict(zip(ids.tolist(), p.tolist(), strict=True)) == pytest.approx({paris: 0.6, lyon: 0.2})
        assert unmatched == 0.0

    def test_the_end_is_a_piece_too(self, tokenizer: Tokenizer) -> None:
        ids, p, _ = distribution(tokenizer, [b"", b" and"], floats(0.7, 0.2))
        assert ids[0] == tokenizer.end_id
        assert p.tolist() == pytest.approx([0.7, 0.2])

    def test_what_has_no_counterpart_is_reported_and_the_rest_renormalised(self, tokenizer: Tokenizer) -> None:
        ids, p, unmatched = distribution(tokenizer, [b" Paris", b"\xff", b" London"], floats(0.4, 0.2, 0.2))
        assert len(ids) == 2
        assert p.tolist() == pytest.approx([0.8 * 4 / 6, 0.8 * 2 / 6])
        assert unmatched == pytest.approx(0.2)

    def test_of_nothing_that_matches_is_empty(self, tokenizer: Tokenizer) -> None:
        for pieces, p in (([], floats()), ([b"\xff"], floats(0.5))):
            ids, mapped, unmatched = distribution(tokenizer, pieces, p)
            assert len(ids) == len(mapped) == 0
            assert unmatched == pytest.approx(float(p.sum()))

    @given(
        pieces=st.lists(st.sampled_from([b" a", b" ab", b" abc", b"\n", b"", b"\xff", b"\xf0\x9f", b"1"]), max_size=8),
        seed=st.integers(0, 1000),
    )
    def test_mass_is_kept(self, tokenizer: Tokenizer, pieces: list[bytes], seed: int) -> None:
        p = np.random.default_rng(seed).dirichlet(np.ones(len(pieces) + 1))[:-1].astype(np.float32)
        ids, mapped, unmatched = distribution(tokenizer, pieces, p)
        assert len(set(ids.tolist())) == len(ids)
        assert all(0 <= token < tokenizer.vocab for token in ids.tolist())
        if len(ids) and unmatched < 0.999 * float(p.sum()):
            assert float(mapped.sum()) == pytest.approx(float(p.sum()), abs=1e-5)
