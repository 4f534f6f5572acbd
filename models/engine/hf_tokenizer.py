"""The tokenizer of a model folder: `tokenizer.json` through the library that it is made for (Hugging Face tokenizers).

Three things are as llama.cpp has them, so that one vocabulary means the same in both engines: text keeps its bytes (no
Unicode normalisation), a byte without a token is left out, and tokens beyond the written vocabulary, which fill up the
logits, have no text.
"""

from __future__ import annotations

import hashlib
import json
import struct
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import tokenizers

from models.engine.base import Tokenizer
from models.hf_config import FolderConfig, read_config, read_json
from protocol.errors import BadModelFile

_NORMAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
ENDS = {
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<EOT>",
}
"""What ends an answer wherever it is a control token, said so or not (llama.cpp has such a list)."""


class HfTokenizer(Tokenizer):
    """`vocab`: ids that the model has logits for."""

    def __init__(self, folder: Path, vocab: int) -> None:
        """Raises BadModelFile."""
        path = folder / "tokenizer.json"
        try:
            self._read(path, vocab)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadModelFile(f"{path}: not as tokenizers are written: {error!r}") from None

    def _read(self, path: Path, vocab: int) -> None:
        folder = path.parent
        written = read_json(path)
        config = read_config(folder)
        self.vocab = vocab
        self._lock = Lock()  # whether control tokens are read is a setting of the library's object
        self._inner = _load(path, written)
        self._added = {int(one["id"]): one for one in written.get("added_tokens", [])}
        self._pieces = _pieces(self._inner, written, self._added, vocab)
        self.template = config.template
        self._begin, self.end_id = self._id(config.begin), self._id(config.end)
        if self.end_id < 0 and config.ends:
            self.end_id = config.ends[0]
        special = {id for id, one in self._added.items() if one.get("special")}
        known = {id for id in special if self._added[id]["content"] in ENDS}
        self.eog = frozenset(id for id in known.union(config.ends, [self.end_id]) if 0 <= id < vocab)
        self._controls = special | self.eog
        self._starts = self._wants_begin(config)

    def _id(self, text: str) -> int:
        found = self._inner.token_to_id(text) if text else None
        return -1 if found is None else int(found)

    def _wants_begin(self, config: FolderConfig) -> bool:
        if config.add_begin is not None:
            return config.add_begin and self._begin >= 0
        return self._begin >= 0 and self._begin in self._inner.encode("", add_special_tokens=True).ids

    def _encode(self, text: str, start: bool, special: bool) -> list[int]:
        with self._lock:
            self._inner.encode_special_tokens = not special
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return [self._begin, *ids] if start and self._starts else ids

    def piece(self, token: int) -> bytes:
        return b"" if token in self._controls else self._pieces[token]

    @cached_property
    def controls(self) -> frozenset[str]:
        return frozenset(map(self.control, self._controls))

    def control(self, token: int) -> str:
        return self._pieces[token].decode(errors="replace")

    @property
    def begin(self) -> str:
        return self.control(self._begin) if self._begin >= 0 else ""

    @property
    def end(self) -> str:
        return self.control(self.end_id) if self.end_id >= 0 else ""

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(struct.pack("<H", len(piece)) + piece)
        return digest.hexdigest()


def _load(path: Path, written: dict[str, Any]) -> tokenizers.Tokenizer:
    bare = written | {
        "normalizer": _without_normal_forms(written.get("normalizer")),
        "model": written["model"] | {"unk_token": None},  # what no token stands for is left out
        "truncation": None,
        "padding": None,
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the library raises no other class
        raise BadModelFile(f"{path}: no tokenizer that can be used: {str(error)[:200]}") from None


def _without_normal_forms(node: Any) -> Any:
    if not isinstance(node, dict) or node.get("type") in _NORMAL_FORMS:
        return None
    if node.get("type") == "Sequence":
        kept = [child for child in map(_without_normal_forms, node.get("normalizers", [])) if child]
        return node | {"normalizers": kept} if kept else None
    return node


def _pieces(inner: tokenizers.Tokenizer, written: dict[str, Any], added: dict[int, Any], vocab: int) -> list[bytes]:
    """The bytes of every token; the written form of control tokens."""
    spell = _byte_level if _has_byte_level(written.get("pre_tokenizer")) else _sentence_piece
    pieces = [b""] * vocab
    for text, id in inner.get_vocab(with_added_tokens=False).items():
        if id < vocab:
            pieces[id] = spell(text)
    for id, one in added.items():
        if 0 <= id < vocab:
            pieces[id] = one["content"].encode()
    return pieces


def _has_byte_level(node: Any) -> bool:
    if not isinstance(node, dict):
        return False
    return node.get("type") == "ByteLevel" or any(map(_has_byte_level, node.get("pretokenizers", [])))


def _byte_level(text: str) -> bytes:
    return b"".join(_BYTES.get(letter) or letter.encode() for letter in text)


def _sentence_piece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes.fromhex(text[3:5])
    return text.replace("▁", " ").encode()


def _letters_of_bytes() -> dict[str, bytes]:
    """GPT-2's way to write any byte as a printable letter (Radford et al., 2019, encoder.py: bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}


_BYTES = _letters_of_bytes()
