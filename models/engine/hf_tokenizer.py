"""The tokenizer of a model folder: `tokenizer.json` through the library that it is made for (Hugging Face tokenizers).

Three things are as llama.cpp has them, so that one vocabulary means the same in both engines: text keeps its bytes (no
Unicode normalisation), a byte without a token is left out, and tokens beyond the written vocabulary, which fill up the
logits, have no text.
"""

from __future__ import annotations

import hashlib
import struct
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import tokenizers

from models.engine.base import Tokenizer
from models.hf_config import FolderConfig, read_config
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
        config = read_config(folder)
        self.vocab = vocab
        self._lock = Lock()  # whether control tokens are read is a setting of the library's object
        self._inner = _load(folder / "tokenizer.json")
        added = self._inner.get_added_tokens_decoder()
        self._pieces = _pieces(self._inner, added, vocab)
        self.template = config.template
        self._begin, self.end_id = self._id(config.begin), self._id(config.end)
        if self.end_id < 0 and config.ends:
            self.end_id = config.ends[0]
        special = {id for id, token in added.items() if token.special and id < vocab}
        known = {id for id in special if added[id].content in ENDS}
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


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
        inner.no_truncation()
        inner.no_padding()
        inner.normalizer = _without_normal_forms(inner.normalizer)
        if hasattr(inner.model, "unk_token"):
            inner.model.unk_token = None  # what no token stands for is left out
    except Exception as error:  # the library raises no other class
        raise BadModelFile(f"{path}: no tokenizer that can be used: {str(error)[:200]}") from None
    return inner


def _without_normal_forms(normalizer: Any) -> Any:
    name = type(normalizer).__name__
    if name == "Sequence":
        return tokenizers.normalizers.Sequence([one for one in normalizer if type(one).__name__ not in _NORMAL_FORMS])
    return None if name in _NORMAL_FORMS else normalizer


def _pieces(inner: tokenizers.Tokenizer, added: dict[int, Any], vocab: int) -> list[bytes]:
    """The bytes of every token; the written form of control tokens."""
    spell = _byte_level if b'"ByteLevel"' in _written(inner.pre_tokenizer) else _sentence_piece
    pieces = [b""] * vocab
    for text, id in inner.get_vocab(with_added_tokens=False).items():
        if id < vocab:
            pieces[id] = spell(text)
    for id, token in added.items():
        if id < vocab:
            pieces[id] = token.content.encode()
    return pieces


def _written(step: Any) -> bytes:
    """As it stands in tokenizer.json."""
    return b"" if step is None else bytes(step.__getstate__())


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
