"""What was answered lately, so that its reader can still say what it was worth. In RAM only."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.errors import RequestError, UnknownAnswer
from protocol.resolve import Message

MAX_BYTES = 8 << 20
MAX_AGE = 3600.0  # seconds
_TOLD = 10_000  # ids of answers that are no longer remembered
_TOKEN_BYTES = 36  # of a Python integer and its place in a list
_FIXED_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Remembered:
    """An answer: what was asked, as it was sent and as it was fed, and what was written."""

    asked: Sequence[Message] | str
    prompt: Sequence[int]
    tokens: Sequence[int]
    private: bool

    @property
    def bytes(self) -> int:
        """Roughly, in RAM."""
        texts = [self.asked] if isinstance(self.asked, str) else [message.content for message in self.asked]
        return _FIXED_BYTES + _TOKEN_BYTES * (len(self.prompt) + len(self.tokens)) + 4 * sum(map(len, texts))


class Answers:
    """By id, bounded by bytes and age, of which the oldest go. `clock`: monotonic, seconds. Thread-safe."""

    def __init__(self, clock: Callable[[], float], max_bytes: int = MAX_BYTES, max_age: float = MAX_AGE) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, Remembered]] = OrderedDict()
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._bytes = 0

    def remember(self, id: str, answer: Remembered) -> None:
        """Nothing is remembered of an answer without id."""
        if not id:
            return
        with self._lock:
            self._known[id] = (self._clock(), answer)
            self._bytes += answer.bytes
            self._bound()

    def find(self, id: str) -> Remembered:
        """Raises UnknownAnswer, or RequestError if it was there once."""
        with self._lock:
            self._bound()
            if id in self._known:
                return self._known[id][1]
            if id in self._gone:
                raise RequestError(
                    "too late: this answer is no longer remembered; send its messages with the correction", "id"
                )
        raise UnknownAnswer("no answer of that id was given since the agent started: send messages instead", "id")

    def _bound(self) -> None:
        oldest = self._clock() - self._max_age
        while self._known and (self._bytes > self._max_bytes or next(iter(self._known.values()))[0] < oldest):
            id, (_, answer) = self._known.popitem(last=False)
            self._bytes -= answer.bytes
            self._gone[id] = None
        while len(self._gone) > _TOLD:
            self._gone.popitem(last=False)
