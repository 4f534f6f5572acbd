"""Between tokenizers: what the LLM says in bytes, on logits made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from models.engine.gguf import GgufTokenizer
from models.sampling import Floats, softmax
from protocol.resolve import Answer, Ask, unpack_floats
from server.cloud.text import Pieces, decide_text
from tests.server.helpers import opening


@pytest.fixture(scope="module")
def pieces(tokenizer: GgufTokenizer) -> Pieces:
    return Pieces(tokenizer)


def favouring(tokenizer: GgufTokenizer, **shares: float) -> Floats:
    """Logits that give each token (written with _ for a space) its share, and the rest to all others."""
    logits = np.zeros(tokenizer.vocab, np.float32)
    for text, share in shares.items():
        (token,) = tokenizer.encode(text.replace("_", " "))
        logits[token] = np.log(share * tokenizer.vocab / (1 - sum(shares.values())))
    return logits


def decided(pieces: Pieces, draft: bytes, script: Sequence[Floats], top: int = 3) -> tuple[Answer, list[list[int]]]:
    """The Answer where the LLM's steps go by `script`, and the tokens that were fed."""
    job = decide_text(pieces, opening("", top=top), Ask(1, 1, 0, draft_text=draft), [5, 6], answer=0, prompt=2)
    fed = [list(next(job))]
    try:
        for logits in script:
            fed += [list(job.send(logits))]
    except StopIteration as stop:
        answer, tokens = stop.value
        assert tokens[: len(fed[-1])] == fed[-1]
        return answer, fed
    raise AssertionError("it wants more than the script has")


@pytest.mark.parametrize("prefix", [b" th", b"the", b"\xf0\x9f", b"zzzzzz", b" "])
def test_tokens_are_found_by_how_they_begin(pieces: Pieces, tokenizer: GgufTokenizer, prefix: bytes) -> None:
    expected = [token for token in range(tokenizer.vocab) if tokenizer.piece(token).startswith(prefix)]
    assert sorted(pieces.beginning_with(prefix).tolist()) == expected


def test_no_text_is_the_end(pieces: Pieces, tokenizer: GgufTokenizer) -> None:
    assert set(pieces.beginning_with(b"").tolist()) == tokenizer.eog


def test_a_token_that_covers_the_draft_is_enough(pieces: Pieces, tokenizer: GgufTokenizer) -> None:
    logits = favouring(tokenizer, _Paris=0.6, _Par=0.2)
    answer, fed = decided(pieces, b" Pari", [logits])
    assert (answer.text, answer.llm_tokens) == (b" Paris", 1)
    assert fed == [[5, 6]]
    assert answer.y_draft == pytest.approx(softmax(logits)[pieces.beginning_with(b" Pari")].sum())
    assert answer.y_pieces[:2] == [b" Paris", b" Par"]
    np.testing.assert_allclose(np.exp(unpack_floats(answer.y_logp))[:2], [0.6, 0.2], atol=0.01)


def test_a_longer_draft_is_followed_as_far_as_it_agrees(pieces: Pieces, tokenizer: GgufTokenizer) -> None:
    script = [favouring(tokenizer, _the=0.8), favouring(tokenizer, _sky=0.5), favouring(tokenizer, _sea=0.9)]
    answer, fed = decided(pieces, b" the sky is blue", script)
    assert (answer.text, answer.llm_tokens) == (b" the sky sea", 3)
    assert [len(tokens) for tokens in fed] == [2, 3, 4]
    assert answer.y_draft < 0.01
    answer, _ = decided(pieces, b" the sky", script)
    assert answer.text == b" the sky"
    assert answer.y_draft == pytest.approx(0.8 * 0.5, abs=0.02)
    assert answer.y_pieces[0] == b" the"  # y is of the first step


def test_the_end_is_empty(pieces: Pieces, tokenizer: GgufTokenizer) -> None:
    logits = np.zeros(tokenizer.vocab, np.float32)
    logits[min(tokenizer.eog)] = 20.0
    answer, _ = decided(pieces, b"", [logits])
    assert (answer.text, answer.y_pieces[0]) == (b"", b"")
    assert answer.y_draft == pytest.approx(1.0, abs=0.01)


def test_the_end_after_the_draft_s_beginning(pieces: Pieces, tokenizer: GgufTokenizer) -> None:
    ended = np.zeros(tokenizer.vocab, np.float32)
    ended[min(tokenizer.eog)] = 20.0
    answer, _ = decided(pieces, b" the sky", [favouring(tokenizer, _the=0.8), ended])
    assert answer.text == b" the"


def test_characters_come_whole(pieces: Pieces, tokenizer: GgufTokenizer) -> None:
    """Three tokens of one emoji: none of them alone is text."""
    tokens = tokenizer.encode("🦊")
    assert len(tokens) > 1
    script = []
    for token in tokens:
        logits = np.zeros(tokenizer.vocab, np.float32)
        logits[token] = 20.0
        script.append(logits)
    answer, _ = decided(pieces, b" fox", script)
    assert answer.text.decode() == "🦊"
    assert answer.llm_tokens == len(tokens)


def test_a_draft_of_any_length_is_followed_for_a_few_tokens_only(pieces: Pieces, tokenizer: GgufTokenizer) -> None:
    answer, _ = decided(pieces, b" the" * 1000, [favouring(tokenizer, _the=0.8)] * 8)
    assert (answer.text, answer.llm_tokens) == (b" the" * 8, 8)
