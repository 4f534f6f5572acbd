"""A session's prompt as the LLM's token ids."""

from __future__ import annotations

from models.chat import encode_chat
from models.engine.base import Tokenizer
from protocol.errors import ContextFull
from protocol.resolve import Open

_BYTES_PER_TOKEN = 16  # more than any text takes on average


def check_length(request: Open, limit: int) -> None:
    """Refuses by bytes what can't fit, before anything is tokenised. Raises ContextFull."""
    texts = [request.prompt] if isinstance(request.prompt, str) else [message.content for message in request.prompt]
    length = sum(map(len, texts))
    if length > limit * _BYTES_PER_TOKEN:
        raise ContextFull(f"the prompt has {length} characters, the limit here is {limit} tokens")


class Prompt:
    """`tokens` is the prompt alone; `follow` puts the answer so far after it. Raises ContextFull, RequestError.

    Messages go through the LLM's own chat template, whatever the device's is. A text is continued, so with another
    tokenizer it is encoded together with the answer: a word may begin in one and end in the other.
    """

    def __init__(self, tokenizer: Tokenizer, request: Open, limit: int) -> None:
        self._tokenizer = tokenizer
        check_length(request, limit)
        if isinstance(request.prompt, str):
            self._text: bytes | None = request.prompt.encode()
            self.tokens = tokenizer.encode(self._text, start=True)
        else:
            self._text = None
            self.tokens = encode_chat(tokenizer, request.prompt)
        if len(self.tokens) > limit:
            raise ContextFull(f"the prompt has {len(self.tokens)} tokens, the limit here is {limit}")

    def follow(self, answer: list[int] | bytes) -> list[int]:
        if not isinstance(answer, bytes):
            return self.tokens + answer
        if self._text is not None:
            return self._tokenizer.encode(self._text + answer, start=True)
        return self.tokens + self._tokenizer.encode(answer)
