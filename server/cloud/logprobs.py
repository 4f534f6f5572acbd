"""Log-probabilities out of the answers of OpenAI-compatible servers, in the three forms there are.

Chat (OpenAI, vLLM): `logprobs.content[]` with `token`, `bytes`, `logprob`, `top_logprobs[]`.
llama-server: the same for completions too, with an `id` in each entry; the end has the text "".
Completions (vLLM, OpenAI): `logprobs.tokens[]`, `.token_logprobs[]`, `.top_logprobs[]`, the last a mapping from the
token's text; with vLLM's `return_tokens_as_token_ids` the texts are `token_id:N`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from models.engine.base import Tokenizer
from protocol.errors import UpstreamError

# How servers that list the end token as text write it.
_ENDS = {
    "",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "</s>",
    "<end_of_turn>",
    "<eos>",
}
_BY_ID = "token_id:"


class Candidate(NamedTuple):
    """A token of the LLM. `piece` b"" is the end of the answer; `id` None where the server does not tell."""

    piece: bytes
    id: int | None
    logp: float


class Position(NamedTuple):
    """The server's own token at one position, and the likeliest ones, largest first."""

    token: Candidate
    top: list[Candidate]


# Where a server tells the end by its finish_reason alone: how sure it was is unknown, but end it does.
END = Position(Candidate(b"", None, 0.0), [Candidate(b"", None, 0.0)])


def positions(choice: Any) -> list[Position]:
    """Those of one choice, or of one chunk of a stream. Raises UpstreamError on a form that is none of the three."""
    try:
        logprobs = choice.get("logprobs")
        if not logprobs:
            return []
        if "content" in logprobs:
            return [_position(entry) for entry in logprobs["content"] or []]
        return _legacy(logprobs)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise UpstreamError("the LLM's server sends log-probabilities in an unknown form") from None


def _position(entry: dict[str, Any]) -> Position:
    top = [_candidate(listed) for listed in entry.get("top_logprobs") or []]
    return Position(_candidate(entry), sorted(top, key=lambda candidate: -candidate.logp))


def _candidate(entry: dict[str, Any]) -> Candidate:
    text, raw = entry["token"], entry.get("bytes")
    if text.startswith(_BY_ID):
        return Candidate(bytes(raw or b""), int(text.removeprefix(_BY_ID)), float(entry["logprob"]))
    piece = b"" if text in _ENDS else bytes(raw) if raw is not None else text.encode()
    return Candidate(piece, entry.get("id"), float(entry["logprob"]))


def _legacy(logprobs: dict[str, Any]) -> list[Position]:
    found = []
    for text, logp, listed in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        top = [_candidate({"token": token, "logprob": value}) for token, value in listed.items()]
        token = _candidate({"token": text, "logprob": logp})
        found.append(Position(token, sorted(top, key=lambda candidate: -candidate.logp)))
    return found


class Identifier:
    """Gives candidates ids and bytes of `tokenizer`, the LLM's own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._end = min(tokenizer.eog)
        self._ids = {tokenizer.piece(token): token for token in range(tokenizer.vocab - 1, -1, -1)}

    def identify(self, candidate: Candidate) -> Candidate | None:
        """None for what is not one token, such as a character that a server has put together of several."""
        token = candidate.id
        if token is None:
            token = self._ids.get(candidate.piece) if candidate.piece else self._end
        if token is None or not 0 <= token < self._tokenizer.vocab:
            return None
        piece = self._tokenizer.piece(token)
        if (candidate.piece and candidate.piece != piece) or not (piece or token in self._tokenizer.eog):
            return None
        return Candidate(piece, token, candidate.logp)

    def position(self, position: Position) -> Position:
        """Raises UpstreamError if the server's own token is none of the tokenizer's."""
        token = self.identify(position.token)
        if token is None:
            raise UpstreamError("the LLM's server emits what is no token of the configured tokenizer")
        top = [found for candidate in position.top if (found := self.identify(candidate))]
        return Position(token, top)
