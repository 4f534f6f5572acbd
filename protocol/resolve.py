"""Messages between a device and the cloud resolver, over one WebSocket (`/v1/resolve`).

Binary frames, MessagePack arrays; the first element names the message. An unknown message or an additional field is
tolerated, so either side may be newer. A connection carries many sessions; a session is one answer being written.

    device                              cloud
                                  ←     Hello(tokenizer, …)         once, as soon as the connection stands
    Open(session, prompt, …)      →
    Ask(session, step, new, …)    →
                                  ←     Answer(session, step, …)    then up to `burst` More
                                  ←     More(session, step, …)
    Close(session)                →
                                  ←     Refused(session, step, why) instead of an Answer

An Ask that a later one takes back, by keeping less than it was about, gets no Answer. Positions of an answer are
counted in its units: token ids if both tokenizers are the same, else bytes.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.errors import ProtocolError

VERSION = 1
MAX_FRAME = 1 << 20  # bytes of one WebSocket message, either way

Mode = Literal["verify", "fuse", "take"]


class Message(msgspec.Struct, frozen=True):
    """One chat message."""

    role: str
    content: str


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How a token is drawn from a distribution. Applied in llama.cpp's order: repetition penalty, top_k, top_p,
    min_p, temperature. Temperature 0 is greedy; top_k 0 keeps the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


class _Frame(msgspec.Struct, frozen=True, array_like=True, tag_field="type"):
    pass


class Open(_Frame, frozen=True, tag="open"):
    """Begins a session; answered only if refused. `prompt`: chat messages or text to continue. `tokenizer`: the
    device's fingerprint. `top`: how many of the LLM's log-probabilities each Answer carries. `burst`: how many more
    tokens may follow."""

    session: int
    prompt: list[Message] | str
    tokenizer: str
    sampling: Sampling
    mode: Mode
    top: int
    burst: int = 0
    version: int = VERSION


class Ask(_Frame, frozen=True, tag="ask"):
    """Asks for the token after the answer so far, which is its first `keep` units as sent before plus what is new.

    Same tokenizer: `tokens` are the new units and `draft` the SLM's token; in mode verify, `x_ids` (uint32) and `x_p`
    (float32) are the SLM's sampling distribution, largest first, up to a mass of 1 - `x_tail`, always with the draft.
    Otherwise: `text` are the new units and `draft_text` the draft's bytes (b"": the SLM would end here).
    """

    session: int
    step: int
    keep: int
    tokens: list[int] = []
    draft: int = -1
    x_ids: bytes = b""
    x_p: bytes = b""
    x_tail: float = 0.0
    text: bytes = b""
    draft_text: bytes = b""


class Close(_Frame, frozen=True, tag="close"):
    session: int


class Hello(_Frame, frozen=True, tag="hello"):
    """The first frame of a connection. `tokenizer`: the LLM's fingerprint, "" if unknown; a device with another one
    speaks bytes. `exact`: in mode verify the Answer's token is decided on the LLM's whole distribution, else only
    `y` is known and the device decides. `top`: the most log-probabilities an Answer can carry."""

    model: str
    tokenizer: str
    exact: bool
    top: int
    version: int = VERSION


class Answer(_Frame, frozen=True, tag="answer"):
    """What the LLM says at one step.

    `tokens` (same tokenizer): the token to emit; in mode verify then alternatives in order, for a device that has to
    refuse one outside the `x` it sent (see agent/combine.py), with `tokens_p` (float32), their probabilities under
    the LLM's sampling distribution. Empty where the device has to decide from y.
    `text` (other tokenizer): the bytes to emit, b"" for the end of the answer.
    `y_logp` (float32): log-probabilities at temperature 1 of the LLM's likeliest tokens, whose ids are `y_ids`
    (uint32) or whose bytes are `y_pieces` (b"": the end). `y_draft`: the draft's probability, -1 if unknown.
    `llm_tokens`: tokens the LLM wrote for this answer; what it read is not counted.
    """

    session: int
    step: int
    tokens: list[int] = []
    text: bytes = b""
    y_ids: bytes = b""
    y_pieces: list[bytes] = []
    y_logp: bytes = b""
    y_draft: float = -1.0
    llm_tokens: int = 1
    tokens_p: bytes = b""


class More(_Frame, frozen=True, tag="more"):
    """The LLM's next token after an Answer (or after the More before): a burst. `text` b"" with token -1: the end."""

    session: int
    step: int
    token: int = -1
    text: bytes = b""


class Refused(_Frame, frozen=True, tag="refused"):
    """`code`: overloaded, context_full, unknown_session, bad_request, rate_limited, upstream, draining.
    `step` -1: the whole session. `retry_after`: seconds, 0 if trying again is of no use."""

    session: int
    step: int
    code: str
    message: str
    retry_after: float = 0.0


FromDevice: TypeAlias = Open | Ask | Close
FromCloud: TypeAlias = Hello | Answer | More | Refused

_encoder = msgspec.msgpack.Encoder()
_from_device = msgspec.msgpack.Decoder(FromDevice)
_from_cloud = msgspec.msgpack.Decoder(FromCloud)
_KNOWN = {"open", "ask", "close", "hello", "answer", "more", "refused"}


def encode(message: FromDevice | FromCloud) -> bytes:
    return _encoder.encode(message)


def decode_from_device(frame: bytes) -> FromDevice | None:
    """None for a message of a newer version. Raises ProtocolError."""
    return _decode(_from_device, frame)  # type: ignore[no-any-return]


def decode_from_cloud(frame: bytes) -> FromCloud | None:
    """None for a message of a newer version. Raises ProtocolError."""
    return _decode(_from_cloud, frame)  # type: ignore[no-any-return]


def _decode(decoder: Any, frame: bytes) -> Any:
    if len(frame) > MAX_FRAME:
        raise ProtocolError(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if _newer(frame):
            return None
        raise ProtocolError(f"malformed frame: {error}") from None


def _newer(frame: bytes) -> bool:
    try:
        raw = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(raw, list) and bool(raw) and isinstance(raw[0], str) and raw[0] not in _KNOWN


def wire_size(payload: int, *, masked: bool) -> int:
    """Bytes of one WebSocket frame with `payload` bytes (RFC 6455, section 5.2). A client's frames are masked."""
    return payload + (2 if payload < 126 else 4 if payload < 65_536 else 10) + (4 if masked else 0)


def pack_ids(ids: NDArray[np.integer[Any]]) -> bytes:
    return ids.astype("<u4").tobytes()


def unpack_ids(raw: bytes) -> NDArray[np.uint32]:
    return _unpack(raw, "<u4")


def pack_floats(values: NDArray[np.floating[Any]]) -> bytes:
    return values.astype("<f4").tobytes()


def unpack_floats(raw: bytes) -> NDArray[np.float32]:
    return _unpack(raw, "<f4")


def _unpack(raw: bytes, dtype: str) -> NDArray[Any]:
    if len(raw) % 4:
        raise ProtocolError(f"a packed array of {len(raw)} bytes is cut off")
    return np.frombuffer(raw, dtype)
