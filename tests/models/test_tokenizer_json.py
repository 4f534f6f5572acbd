"""A GGUF file's tokenizer as `tokenizer.json`: real vocabularies, every text the same tokens as llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.engine.base import Tokenizer
from models.engine.gguf import GgufTokenizer
from models.engine.hf_tokenizer import HfTokenizer
from models.gguf_header import check_tensors
from models.workshop.tokenizer_json import write_tokenizer
from protocol.errors import BadModelFile

Pair = tuple[Tokenizer, Tokenizer]

TEXTS = [
    "In 1984, 3.14159 and 12345678 were numbers; 'twas Dr. O'Neil's DON'T-DO list.\n\n\n\tEnd.   ",
    "def naïve(café: int = 0) -> dict[str, list[float]]:\r\n    return {'a': [1e-9]}  # ¼ ² Ⅷ",
    "Привет, мир! 日本語のテキスト。 한국어 العربية हिन्दी 👩‍👩‍👧‍👦 🇫🇷",
    "<tool_call>{}</tool_call> <|im_start|>user<|im_end|> <|endoftext|>",
]


@pytest.fixture(scope="module", params=["smollm2", "qwen"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """llama.cpp's tokenizer, and ours of the file that was written for it."""
    source: Path = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(check_tensors(source).values, folder / "tokenizer.json")
    original = GgufTokenizer.open(source)
    return original, HfTokenizer(folder, original.vocab)


def test_the_vocabulary_is_the_same(pair: Pair) -> None:
    original, written = pair
    assert written.fingerprint == original.fingerprint
    assert written.controls == original.controls
    assert written.eog <= original.eog  # llama.cpp also has those of fill-in-the-middle, which an export writes down


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_the_same_tokens(pair: Pair, text: str, special: bool) -> None:
    original, written = pair
    assert written.encode(text, special=special) == original.encode(text, special=special)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=0x2FFFF, exclude_categories=["Cs", "Cn", "Co"]), max_size=60))
def test_any_text_has_the_same_tokens(pair: Pair, text: str) -> None:
    original, written = pair
    tokens = original.encode(text)
    assume(original.decode(tokens) == text.encode())  # a byte without a token parts its neighbours in llama.cpp only
    assert written.encode(text) == tokens


def test_an_unknown_way_to_split_is_refused(smollm2: Path, tmp_path: Path) -> None:
    values = check_tensors(smollm2).values | {"tokenizer.ggml.pre": "something-new"}
    with pytest.raises(BadModelFile, match=r"something-new.*Hugging Face folder"):
        write_tokenizer(values, tmp_path / "tokenizer.json")
