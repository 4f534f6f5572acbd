"""`tokenizer.json` out of a GGUF file, so that text has the same tokens for llama.cpp and for the tokenizers library.

Two kinds of vocabulary are written from the file's own lists: byte-level BPE (`tokenizer.ggml.model = "gpt2"`) and
SentencePiece (`"llama"`), whose pieces are joined in the order of their scores. The file's token types decide which
are control tokens, which are found in any text, and which only fill up the logits. As llama.cpp does, what looks like
the end of an answer is a control token even where the file forgot to say so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.engine.hf_tokenizer import ENDS
from protocol.errors import BadModelFile

_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5  # llama.cpp's token types
_SPACE = "▁"  # SentencePiece's

_OTHERWISE = "export from the model's Hugging Face folder, which has a tokenizer.json"

_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_DIGITS = {"type": "Digits", "individual_digits": True}
_NAMES: list[tuple[str, list[Any]]] = [
    ("gpt-2", [_GPT2]),
    ("smollm starcoder refact command-r codeshell", [_DIGITS, _GPT2]),
    ("qwen2 stablelm2 deepseek-r1-qwen megrez", [_QWEN2, _BYTES]),
    ("llama-bpe llama3 llama-v3 dbrx smaug-bpe falcon3", [_LLAMA3, _BYTES]),
]
_SPLITS = {name: steps for names, steps in _NAMES for name in names.split()}
"""llama.cpp's names of how a text is split before its tokens are looked up (src/llama-vocab.cpp), as far as known."""


def write_tokenizer(values: dict[str, Any], path: Path) -> None:
    """`values`: of the GGUF file's header. Raises BadModelFile if its vocabulary is of another kind."""
    kind = values.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise BadModelFile(f"its vocabulary is of the kind {kind!r}, which is not known; {_OTHERWISE}")
    tokens = _written(values, spaces=kind == "llama")
    vocab = {token: id for token, id, type in tokens if type != _UNUSED}
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": type in (_CONTROL, _UNKNOWN) or token in ENDS,
        }
        for token, id, type in tokens
        if type in (_CONTROL, _UNKNOWN, _USER) or token in ENDS
    ]
    made = _byte_level(values) if kind == "gpt2" else _sentence_piece(values, vocab)
    made["model"]["vocab"] = vocab
    made |= {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "added_tokens": added}
    path.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


def _written(values: dict[str, Any], *, spaces: bool) -> list[tuple[str, int, int]]:
    """Each token's text, id and type. `spaces`: tokens that are found in any text are written with spaces in them."""
    types = values["tokenizer.ggml.token_type"]
    return [
        (token.replace(_SPACE, " ") if spaces and type == _USER else token, id, type)
        for id, (token, type) in enumerate(zip(values["tokenizer.ggml.tokens"], types, strict=True))
    ]


def _byte_level(values: dict[str, Any]) -> dict[str, Any]:
    name = str(values.get("tokenizer.ggml.pre", "gpt-2"))
    if name not in _SPLITS:
        raise BadModelFile(f"its texts are split as {name!r}, which is not known; {_OTHERWISE}")
    steps = [_split(step) if isinstance(step, str) else step for step in _SPLITS[name]]
    whole_words = name in ("llama-bpe", "llama3", "llama-v3")
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": _BYTES,
        "model": _BPE | {"merges": values["tokenizer.ggml.merges"], "ignore_merges": whole_words},
    }


def _sentence_piece(values: dict[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    steps: list[Any] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    if values.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": _BPE | {"merges": _merges(values["tokenizer.ggml.scores"], vocab), "byte_fallback": True},
    }


def _merges(scores: list[float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best score of the third first: llama.cpp joins the neighbours whose
    union has the highest score."""
    merges = []
    for token in sorted(vocab, key=lambda token: -scores[vocab[token]]):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]
    return merges


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
