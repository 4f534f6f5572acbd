"""The agent: a model, what it may ask, and the answers it is writing."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from agent.adapt.router import Router
from agent.adapt.shelf import AUTO, Shelf, Used, mix_of
from agent.agreement import Agreement
from agent.combine import Weight
from agent.loop import Need, Plan, Token, TokenLoop
from agent.policy import Policy
from agent.privacy import Guard, Outcome, Privacy
from agent.resolver import Conversation, Provenance, Resolver, Traffic
from agent.scheduler import Job, Scheduler
from agent.text import TextStream
from agent.uncertainty import Measure, Softmax
from models.chat import encode_chat
from models.engine.base import Engine, Mix, Step, Tokenizer
from models.engine.base import Sequence as Place
from protocol.errors import Overloaded
from protocol.resolve import Message, Mode, Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """`prompt`: chat messages, or text to continue. `private`: nothing of it leaves the device. `top`: likeliest
    tokens to note at each step. `id`: the answer's, if it is to be found again. `adapter`: auto (the nearest
    of those in use, if one is near), none, a slot, or how an id begins. None: as the agent is configured."""

    prompt: Sequence[Message] | str
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    private: bool = False
    top: int = 0
    mode: Mode | None = None
    id: str = ""
    adapter: str = AUTO


@dataclass(frozen=True, slots=True)
class Options:
    """How the agent makes its answers (configuration sections `policy` and `cloud`)."""

    policy: Policy
    measure: Measure = "entropy"
    mode: Mode = "take"
    weight: Weight = 0.5
    ahead: int = 32
    in_flight: int = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """One settled token and the text that it adds (whole characters only, so it may be empty)."""

    token: Token
    raw: bytes
    text: str


@dataclass(frozen=True, slots=True)
class Account:
    """What one answer took. `borrowed`: tokens that another device had learned. `unmatched`: mean probability mass of a
    reply that has no counterpart among the SLM's tokens. `adapters`: that the SLM wrote with. `privacy`: what was
    done about personal data, as in Outcome. Times in seconds; `tok_s` from the first token to the last."""

    finish: str
    prompt_tokens: int
    tokens: int
    counts: dict[str, int]
    mean_u: float
    llm_tokens: int
    bytes_up: int
    bytes_down: int
    peer_bytes_up: int
    peer_bytes_down: int
    borrowed: int
    asked: int
    rewinds: int
    unmatched: float
    waited: float
    first_token: float
    seconds: float
    tok_s: float
    threshold: float
    mode: str
    privacy: str
    model: str
    fingerprint: str
    adapters: tuple[Used, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A whole answer: its request, the prompt's tokens as they were fed, and the tokens that followed. The request is
    private also if something personal was found in it or in the answer."""

    request: Request
    prompt: Sequence[int]
    tokens: Sequence[Token]


Event: TypeAlias = Piece | Account | Exception


class Writing:
    """One answer under way. Everything but `cancel` runs on the scheduler's thread."""

    def __init__(self, agent: Agent, request: Request, on_event: Callable[[Event], None]) -> None:
        prompt = agent.encode(request.prompt)
        self._guard = agent.guard(request)
        if self._guard is not None and self._guard.outcome is Outcome.LOCAL:
            request = replace(request, private=True)
        self._agent = agent
        self._request = request
        self._mode: Mode = request.mode or agent.options.mode
        self._on_event = on_event
        self._text = TextStream(request.stop, self._guard.restoring if self._guard else None)
        self._tokens: list[Token] = []
        self._times: list[float] = []
        self._conversation: Conversation | None = None
        self._loop: TokenLoop | None = None
        self._adapters: tuple[Used, ...] = ()
        self._policy = agent.options.policy
        self._began = time.monotonic()
        self.job = Job(prompt, request.max_tokens, self._start, self._finish, choose=self._choose)

    def cancel(self) -> None:
        self._agent.scheduler.cancel(self.job)

    def _choose(self) -> Mix:
        """Just before there is a place, so that it can be one whose prefix was read with the same adapters."""
        request = self._request
        self._adapters = self._agent.shelf.choose(request.adapter, self.job.prompt, private=request.private)
        return mix_of(self._adapters)

    def _start(self, place: Place) -> Generator[Need, Step | None, str]:
        agent, request = self._agent, self._request
        self._conversation = self._converse(agent.inward if request.private else agent.resolver)
        if self._adapters:
            self._policy = agent.policy_of(max(self._adapters, key=lambda used: used.weight).id)
        plan = Plan(
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            policy=self._policy,
            measure=agent.options.measure,
            mode=self._mode,
            weight=agent.options.weight,
            ahead=agent.options.ahead,
            in_flight=agent.options.in_flight,
            top=request.top,
            adapter=_alone(self._adapters),
        )
        eog = agent.engine.tokenizer.eog
        self._loop = TokenLoop(plan, place, agent.softmax, eog, self._conversation, self._emit, agent.agreement)
        return self._loop.run(place.align(self.job.prompt))

    def _converse(self, resolver: Resolver | None) -> Conversation | None:
        if resolver is None:
            return None
        sampling, wake = self._request.sampling, lambda: self._agent.scheduler.wake(self.job)
        if self._guard is None:
            return resolver.open(self._request.prompt, sampling, self._mode, wake)
        self._mode = self._guard.mode(self._mode)
        return self._guard.open(resolver, sampling, self._mode, wake)

    def _emit(self, token: Token) -> bool:
        if self._conversation is not None and not (self._conversation.alone or self._request.private):
            self._agent.note(token, len(self._tokens))
        self._tokens.append(token)
        self._times.append(time.monotonic())
        raw = self._agent.engine.tokenizer.piece(token.id)
        text = self._text.push(raw)
        self._on_event(Piece(token, raw, text))
        return self._text.stopped

    def _finish(self, outcome: str | Exception) -> None:
        if self._conversation is not None:
            self._conversation.close()
        if isinstance(outcome, Exception):
            self._on_event(outcome)
            return
        if self._tokens and (rest := self._text.push(b"", final=True)):
            self._on_event(Piece(self._tokens[-1], b"", rest))
        if self._guard is not None:
            self._guard.finish([token.id for token in self._tokens])
        private = self._request.private or (self._guard is not None and self._guard.private)
        self._agent.finished(Finished(replace(self._request, private=private), self.job.prompt, self._tokens))
        self._on_event(self._account(outcome))

    def _account(self, finish: str) -> Account:
        tokens, times, now = self._tokens, self._times, time.monotonic()
        traffic = self._conversation.traffic if self._conversation else Traffic()
        counts = Counter(str(token.provenance) for token in tokens)
        span = times[-1] - times[0] if len(times) > 1 else now - self._began
        return Account(
            finish=finish,
            prompt_tokens=len(self.job.prompt),
            tokens=len(tokens),
            counts={str(who): counts[who] for who in Provenance},
            mean_u=sum(token.u for token in tokens) / max(1, len(tokens)),
            llm_tokens=traffic.llm_tokens,
            bytes_up=traffic.bytes_up,
            bytes_down=traffic.bytes_down,
            peer_bytes_up=traffic.peer_bytes_up,
            peer_bytes_down=traffic.peer_bytes_down,
            borrowed=sum(1 for token in tokens if token.origin),
            asked=traffic.asked,
            rewinds=self._loop.rewinds if self._loop else 0,
            unmatched=traffic.unmatched / max(1, traffic.asked),
            waited=sum(token.wait for token in tokens),
            first_token=times[0] - self._began if times else 0.0,
            seconds=now - self._began,
            tok_s=max(1, len(tokens) - 1) / max(span, 1e-9) if tokens else 0.0,
            threshold=self._policy.threshold,
            mode=self._mode,
            privacy=str(self._guard.outcome) if self._guard else "local" if self._request.private else "free",
            model=self._agent.engine.info.name,
            fingerprint=self._agent.engine.info.fingerprint,
            adapters=self._adapters,
        )


class Agent:
    """Owns the engine's thread. `resolver` None: the device writes alone. `inward`, for private requests, is a resolver
    that has no way out of the device. `note` is told of each settled token that others might have been asked for,
    and of its position in the answer; `finished` of each whole answer. Both are called on the engine's thread.
    `policy_of` gives the policy of answers that an adapter (id) has most say in. `router` None: requests get an adapter
    only if they name it. `privacy` None: personal data is not looked for."""

    def __init__(
        self,
        engine: Engine,
        options: Options,
        resolver: Resolver | None = None,
        queue: int = 16,
        inward: Resolver | None = None,
        note: Callable[[Token, int], None] = lambda token, position: None,
        finished: Callable[[Finished], None] = lambda answer: None,
        policy_of: Callable[[str], Policy] | None = None,
        router: Router | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        self.engine = engine
        self.options = options
        self.resolver = resolver
        self.inward = inward
        self.note = note
        self.finished = finished
        self.privacy = privacy
        self.policy_of = policy_of or (lambda adapter: options.policy)
        self.agreement = Agreement()
        self.softmax = Softmax(engine.info.vocab)
        self.scheduler = Scheduler(engine, time.monotonic, queue)
        self.shelf = Shelf(engine, self.scheduler.run, router)
        self._changed = threading.Condition()
        self._users = 0  # threads that tokenize a prompt
        self._closed = False

    def encode(self, prompt: Sequence[Message] | str) -> list[int]:
        """The prompt's tokens. Raises RequestError if the model has no template for messages."""
        return encode(self.engine.tokenizer, prompt)

    def guard(self, request: Request) -> Guard | None:
        """None where there is nothing to look for: what is private stays here whatever is in it."""
        if self.privacy is None or request.private:
            return None
        return self.privacy.guard(request.prompt, self.engine.tokenizer)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Writing:
        """Begins an answer; `on_event` is called on the engine's thread with each Piece, then with an Account or an
        error. Raises RequestError, Overloaded."""
        self.shelf.check(request.adapter, private=request.private)
        with self.using_model():
            writing = Writing(self, request, on_event)
            self.scheduler.submit(writing.job)
        return writing

    @contextmanager
    def using_model(self) -> Iterator[None]:
        """Keeps `close` from freeing the model under a thread that tokenizes with it."""
        with self._changed:
            if self._closed:
                raise Overloaded("the agent is shutting down")
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    async def stream(
        self, request: Request, note: Callable[[Event], None] = lambda event: None
    ) -> AsyncGenerator[Piece | Account, None]:
        """The same on an event loop. Leaving the iteration early cancels the answer. Raises its error. `note` sees
        every event on the engine's thread, those of an answer that was left included."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand_over(event: Event) -> None:
            note(event)
            with suppress(RuntimeError):  # the event loop is gone, and the listener with it
                loop.call_soon_threadsafe(events.put_nowait, event)

        writing = await self._submit_on_thread(request, hand_over)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Account):
                    return
        finally:
            writing.cancel()

    async def _submit_on_thread(self, request: Request, on_event: Callable[[Event], None]) -> Writing:
        """Tokenizing a megabyte takes a second, for which the event loop must not stand still."""
        task = asyncio.create_task(asyncio.to_thread(self.submit, request, on_event))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_cancel)
            raise

    def close(self) -> None:
        """Ends every answer and frees the model. End the resolver's link first."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._users == 0)
        self.scheduler.close()
        self.engine.close()


def _alone(used: Sequence[Used]) -> str | None:
    """As in Plan.adapter."""
    return "" if not used else used[0].id if len(used) == 1 else None


def encode(tokenizer: Tokenizer, prompt: Sequence[Message] | str) -> list[int]:
    """A prompt as the model is fed it. Raises RequestError if it has no template for messages."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, start=True) or tokenizer.encode("\n")
    return encode_chat(tokenizer, prompt)


def _cancel(task: asyncio.Task[Writing]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().cancel()


def random_seed() -> int:
    """For requests that name none."""
    return random.SystemRandom().getrandbits(48)
