"""What left a device: every byte that passed a recording proxy, and every way in which a text may hide in them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from urllib.parse import quote

import msgspec
import numpy as np

from models.engine.base import Tokenizer
from protocol.resolve import Ask, Open, decode_from_device


def frames(sent: bytes) -> Iterator[bytes]:
    """The payloads of a client's binary WebSocket frames (RFC 6455, section 5.2), one connection after another."""
    at = 0
    while (start := sent.find(b"\r\n\r\n", at)) >= 0:
        at = start + 4
        while at + 6 <= len(sent) and not sent.startswith(b"GET ", at):
            binary, size, at = sent[at] & 15 == 2, sent[at + 1] & 127, at + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                size, at = int.from_bytes(sent[at : at + width], "big"), at + width
            mask, at = sent[at : at + 4], at + 4
            if binary and at + size <= len(sent):
                yield bytes(byte ^ mask[index % 4] for index, byte in enumerate(sent[at : at + size]))
            at += size


def heard(payloads: list[bytes], tokenizer: Tokenizer) -> list[str]:
    """What the other side can put together from the frames: the prompts, and the answer with its draft at each Ask."""
    texts: list[str] = []
    answers: dict[int, list[int]] = {}
    spoken: dict[int, bytes] = {}
    for payload in payloads:
        match decode_from_device(payload):
            case Open() as opened:
                answers[opened.session], spoken[opened.session] = [], b""
                whole = opened.prompt
                texts += [whole] if isinstance(whole, str) else [message.content for message in whole]
            case Ask() as ask:
                known = answers[ask.session] = [*answers[ask.session][: ask.keep], *ask.tokens]
                said = spoken[ask.session] = spoken[ask.session][: ask.keep] + ask.text
                draft = tokenizer.piece(ask.draft) if ask.draft >= 0 else ask.draft_text
                texts.append((tokenizer.decode(known) + said + draft).decode("utf-8", "replace"))
    return texts


def told(texts: list[str], private: str) -> bool:
    """Does one of the texts hold it, however it is spaced, or a good part of it?"""
    parts = [private, *re.findall(r"\d{4,}|[^\W\d_]{5,}", private)]
    squeezed = [re.sub(r"[^\w@]", "", text).casefold() for text in texts]
    return any(re.sub(r"[^\w@]", "", part).casefold() in text for part in parts for text in squeezed)


def forms(private: str, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The bytes in which it might travel."""
    yield from (private.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be"))
    yield from (json.dumps(private)[1:-1].encode(), quote(private).encode(), quote(private, safe="").encode())
    yield private.encode().hex().encode()
    for shift in range(3):  # base64 of a text that begins anywhere
        whole = base64.b64encode(b"\0" * shift + private.encode())
        yield whole[4 if shift else 0 : len(whole) - 4]
    for text in (private, " " + private):
        tokens = tokenizer.encode(text)
        if len(tokens) < 3:
            continue
        yield np.array(tokens, "<u4").tobytes()
        yield np.array(tokens, ">u4").tobytes()
        yield b"".join(map(msgspec.msgpack.encode, tokens))
        yield json.dumps(tokens)[1:-1].encode()
        yield json.dumps(tokens, separators=(",", ":"))[1:-1].encode()
        yield b"".join(map(_varint, tokens))


def _varint(number: int) -> bytes:
    raw = bytearray()
    while number > 127:
        raw.append(number & 127 | 128)
        number >>= 7
    return bytes([*raw, number])
