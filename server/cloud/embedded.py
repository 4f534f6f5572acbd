"""The LLM in this process: our own engine behind a `Scheduler`. It knows the whole distribution, so verify is exact."""

from __future__ import annotations

import asyncio
import contextlib

from models.engine.base import Engine, Sequence, Tokenizer
from protocol.errors import ContextFull, RequestError
from protocol.resolve import Answer, Ask, More, Open
from server.cloud.decide import MAX_TOP, decide, take
from server.cloud.prompt import Prompt
from server.cloud.scheduler import Job, Scheduler
from server.cloud.text import Pieces, decide_text
from server.cloud.upstream import Conversation, Upstream


class EmbeddedUpstream(Upstream):
    """Takes over `engine`; making one reads its whole vocabulary, which takes a second or two.

    `prompt_tokens` and `answer_tokens`: the room that a session gets at most.
    """

    def __init__(self, engine: Engine, *, prompt_tokens: int = 4096, answer_tokens: int = 1024) -> None:
        self.name = engine.info.name
        self.tokenizer = engine.tokenizer.fingerprint
        self.exact = True
        self.top = MAX_TOP
        self._context = engine.context
        self._tokenizer = engine.tokenizer
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = answer_tokens
        self._pieces = Pieces(engine.tokenizer)
        self._scheduler = Scheduler(engine)
        self._reads: set[asyncio.Task[Prompt]] = set()

    async def open(self, request: Open) -> Conversation:
        # A long prompt takes too long to encode for the event loop.
        reading = asyncio.create_task(asyncio.to_thread(Prompt, self._tokenizer, request, self._prompt_tokens))
        self._reads.add(reading)
        reading.add_done_callback(self._reads.discard)
        prompt = await asyncio.shield(reading)
        reserve = max(1, min(self._answer_tokens, self._context - len(prompt.tokens)))
        sequence = await self._scheduler.open(prompt.tokens, reserve)
        # The first Ask takes this job's place and goes on from where it is; what fails here fails there too.
        self._scheduler.submit(sequence, _feed(prompt.tokens))
        if self.same_tokenizer(request):
            return _TokenConversation(self._scheduler, sequence, self._tokenizer, prompt, request)
        return _TextConversation(self._scheduler, sequence, self._pieces, prompt, request)

    async def ready(self) -> bool:
        return self._scheduler.alive

    async def close(self) -> None:
        await asyncio.gather(*self._reads, return_exceptions=True)  # they read from the model that is about to go
        await self._scheduler.close()


class _Conversation(Conversation):
    def __init__(self, scheduler: Scheduler, sequence: Sequence, prompt: Prompt, request: Open) -> None:
        self._scheduler = scheduler
        self._sequence = sequence
        self._prompt = prompt
        self._request = request
        self._next: list[int] | None = None  # prompt, answer and what was decided last; None: nothing can follow

    def close(self) -> None:
        self._scheduler.release(self._sequence)


class _TokenConversation(_Conversation):
    def __init__(
        self, scheduler: Scheduler, sequence: Sequence, tokenizer: Tokenizer, prompt: Prompt, request: Open
    ) -> None:
        super().__init__(scheduler, sequence, prompt, request)
        self._tokenizer = tokenizer
        self._step = 0

    async def ask(self, ask: Ask, answer: list[int] | bytes) -> Answer:
        if isinstance(answer, bytes) or not all(0 <= token < self._tokenizer.vocab for token in answer):
            raise RequestError("the answer must be token ids of the session's tokenizer", "tokens")
        self._next, self._step = None, ask.step
        target = self._prompt.follow(answer)
        reply = await self._scheduler.run(self._sequence, self._decide(ask, answer, target))
        self._extend(target, reply.tokens[:1])
        return reply

    async def more(self) -> More | None:
        if self._next is None:
            return None
        target = self._next
        with contextlib.suppress(ContextFull):
            token = await self._scheduler.run(self._sequence, self._take(target), speculative=True)
            self._extend(target, [token])
            return More(self._request.session, self._step, token=token, text=self._tokenizer.piece(token))
        return None

    def _extend(self, target: list[int], decided: list[int]) -> None:
        ended = not decided or decided[0] in self._tokenizer.eog
        self._next = None if ended else target + decided

    def _decide(self, ask: Ask, answer: list[int], target: list[int]) -> Job[Answer]:
        logits = yield target
        return decide(logits, self._request, ask, answer)

    def _take(self, target: list[int]) -> Job[int]:
        logits = yield target
        return take(logits, self._request, target[len(self._prompt.tokens) :])


class _TextConversation(_Conversation):
    def __init__(self, scheduler: Scheduler, sequence: Sequence, pieces: Pieces, prompt: Prompt, request: Open) -> None:
        super().__init__(scheduler, sequence, prompt, request)
        self._pieces = pieces
        self._length = 0  # bytes of the answer in `_next`
        self._step = 0

    async def ask(self, ask: Ask, answer: list[int] | bytes) -> Answer:
        if not isinstance(answer, bytes):
            raise RequestError("the answer must be text: the tokenizers differ", "text")
        self._length, self._step = len(answer), ask.step
        return await self._decide(ask, self._prompt.follow(answer), speculative=False)

    async def more(self) -> More | None:
        if self._next is None:
            return None
        ask = Ask(self._request.session, self._step, 0)
        with contextlib.suppress(ContextFull):
            reply = await self._decide(ask, self._next, speculative=True)
            return More(ask.session, ask.step, text=reply.text)
        return None

    async def _decide(self, ask: Ask, target: list[int], *, speculative: bool) -> Answer:
        self._next = None
        job = self._job(ask, target)
        reply, tokens = await self._scheduler.run(self._sequence, job, speculative=speculative)
        self._next = tokens if reply.text else None
        self._length += len(reply.text)
        return reply

    def _job(self, ask: Ask, target: list[int]) -> Job[tuple[Answer, list[int]]]:
        prompt = len(self._prompt.tokens)
        return (yield from decide_text(self._pieces, self._request, ask, target, self._length, prompt))


def _feed(tokens: list[int]) -> Job[None]:
    yield tokens
