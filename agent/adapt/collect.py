"""From finished answers to lessons, and what is remembered of an answer until its reader says what it was worth.

note ──► queue in RAM ──► lesson ──► Lessons (disk)
(the engine's thread)  └──── thread ────┘
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from agent.adapt.answers import Answers, Remembered
from agent.adapt.lesson import Lesson, Target
from agent.adapt.lessons import Lessons
from agent.agent import Finished
from agent.loop import Token
from agent.policy import Why
from agent.resolver import Provenance
from protocol.errors import TrainingError

log = logging.getLogger(__name__)

KEPT = 16  # kept steps of an answer that are to stay as they are, at most
_LINGER_S = 2.0  # how long an answer waits for the disk
_TEND_S = 3600.0  # between two looks at what is too old
_LONGEST_PAUSE_S = 60.0  # while the disk refuses
_QUEUE = 64  # answers that wait for the thread; what is older teaches nothing


class Collector:
    """`note` returns at once; all else may wait for the disk, and be called by any thread. `refused`: answers whose
    lesson made no sense."""

    def __init__(self, lessons: Lessons, answers: Answers) -> None:
        self.lessons = lessons
        self.refused = 0
        self._answers = answers
        self._queue: deque[Finished] = deque(maxlen=_QUEUE)
        self._lock = threading.Lock()  # of what takes from the queue
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lessons", daemon=True)
        self._thread.start()

    def note(self, answer: Finished) -> None:
        """`finished` of the Agent."""
        self._queue.append(answer)

    def answer(self, id: str) -> Remembered:
        """Its lesson is in the store when this returns. Raises UnknownAnswer, RequestError."""
        self.flush()
        return self._answers.find(id)

    def flush(self) -> None:
        """Makes lessons of all answers that are finished."""
        with self._lock:
            while self._queue:
                self._take(self._queue.popleft())

    def close(self) -> None:
        """Writes what is in RAM, if the disk takes it. Idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            self.flush()
            self.lessons.close()

    def _take(self, answer: Finished) -> None:
        request = answer.request
        written = [token.id for token in answer.tokens]
        self._answers.remember(request.id, Remembered(request.prompt, answer.prompt, written, request.private))
        lesson = lesson_of(answer.prompt, answer.tokens, request.private, request.sampling.seed)
        if lesson is None:
            return
        try:
            self.lessons.add(lesson, request.id)
        except TrainingError:  # of what a cloud may say that makes no sense
            self.refused += 1

    def _run(self) -> None:
        pause, since_tended = _LINGER_S, 0.0
        while not self._closing.wait(pause):
            self.flush()
            since_tended += pause
            if since_tended >= _TEND_S or self.lessons.waiting:
                since_tended = 0.0
                tended = self.lessons.tend()
                pause = _LINGER_S if tended else min(_LONGEST_PAUSE_S, 2 * pause)


def lesson_of(prompt: Sequence[int], tokens: Sequence[Token], private: bool, seed: int) -> Lesson | None:
    """What the LLM said at the steps that it answered, and of the steps that were kept a sample as large, against
    forgetting. None if it was not asked or said nothing.

    A token that the LLM wrote on by itself, of which it told no distribution, is a draw from that: a label.
    """
    targets = list(_taught(len(prompt), tokens))
    if not targets:
        return None
    kept = [
        Target(position, "kept")
        for position, token in enumerate(tokens, len(prompt))
        if token.why is Why.KEEP and token.provenance is Provenance.LOCAL
    ]
    most = min(len(kept), len(targets), KEPT)
    targets += random.Random(seed).sample(kept, most)
    targets.sort(key=lambda target: target.position)
    return Lesson([*prompt, *(token.id for token in tokens)], targets, "cloud", private, prompt=len(prompt))


def _taught(start: int, tokens: Sequence[Token]) -> Iterator[Target]:
    for position, token in enumerate(tokens, start):
        if token.provenance is not Provenance.CLOUD:
            continue
        if token.y_ids is not None and token.y_p is not None and len(token.y_ids):
            yield Target(position, "cloud", token.y_ids.tolist(), token.y_p.astype(float).tolist())
        else:
            yield Target(position, "label", [token.id])
