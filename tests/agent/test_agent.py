"""Several answers at once: alike to each alone, fairly placed, and safe from each other's failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path

import pytest

from agent.agent import Account, Agent, Event, Options, Piece, Request
from agent.policy import Decision, Policy, ThresholdPolicy
from agent.resolver import Conversation
from models.engine.base import Engine, Step
from models.engine.open import EngineOptions, open_engine
from protocol.errors import ContextFull, Overloaded, RequestError
from protocol.resolve import Message, Mode, Sampling
from tests.agent.scripted import ScriptedResolver, says

PROMPTS = ("The capital of France is", "Once upon a time", "Water boils at", "def add(a, b):")
CONTEXT = 320
SEQUENCES = 3
PATIENCE = 60.0  # seconds after which a test gives up on something that never comes


@pytest.fixture(scope="module")
def engine(slm: Path) -> Iterator[Engine]:
    engine = open_engine(slm, EngineOptions(context=CONTEXT, sequences=SEQUENCES, threads=1))
    yield engine
    engine.close()


Build = Callable[..., Agent]


@pytest.fixture
def build(engine: Engine) -> Iterator[Build]:
    """Makes agents that share the engine, one after the other."""
    agents: list[Agent] = []

    def make(policy: Policy | None = None, **options: object) -> Agent:
        agents.append(Agent(engine, Options(policy or ThresholdPolicy(1.0)), **options))  # type: ignore[arg-type]
        return agents[-1]

    yield make
    for agent in agents:
        agent.scheduler.close()


class Listener:
    """Collects one answer's events. `hold`: the answer stands still at its first piece until `go_on` is set."""

    def __init__(self, *, hold: bool = False) -> None:
        self.pieces: list[Piece] = []
        self.outcome: Future[Account] = Future()
        self.began = threading.Event()
        self.go_on = threading.Event()
        if not hold:
            self.go_on.set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.pieces.append(event)
            self.began.set()
            assert self.go_on.wait(PATIENCE)
        elif isinstance(event, Account):
            self.outcome.set_result(event)
        else:
            self.outcome.set_exception(event)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def account(self) -> Account:
        return self.outcome.result(PATIENCE)


def ask(agent: Agent, request: Request) -> Listener:
    listener = Listener()
    agent.submit(request, listener)
    return listener


def answer(agent: Agent, prompt: Sequence[Message] | str, **options: object) -> Listener:
    listener = ask(agent, Request(prompt, **({"max_tokens": 12} | options)))  # type: ignore[arg-type]
    listener.account()
    return listener


class TestOne:
    def test_is_accounted_for(self, build: Build) -> None:
        listener = answer(build(), PROMPTS[0])
        account = listener.account()
        assert (account.finish, account.tokens, account.counts["local"]) == ("length", 12, 12)
        assert account.prompt_tokens > 3
        assert (account.asked, account.bytes_up, account.bytes_down, account.llm_tokens) == (0, 0, 0, 0)
        assert 0.0 < account.first_token <= account.seconds
        assert account.tok_s > 0.0
        assert [piece.token.id for piece in listener.pieces][-1] == listener.pieces[-1].token.id

    def test_text_is_what_the_tokens_say(self, build: Build, engine: Engine) -> None:
        listener = answer(build(), PROMPTS[1])
        assert listener.text.encode() == engine.tokenizer.decode([piece.token.id for piece in listener.pieces])

    def test_messages(self, build: Build) -> None:
        listener = answer(build(), [Message("user", "Say hi.")], max_tokens=60)
        assert listener.account().finish == "stop"
        assert listener.text

    def test_an_empty_prompt_is_answered(self, build: Build) -> None:
        assert answer(build(), "", max_tokens=3).account().tokens == 3

    def test_stop_strings_end_it(self, build: Build) -> None:
        agent = build()
        whole = answer(agent, PROMPTS[1], max_tokens=20).text
        word = whole.split()[4]
        stopped = answer(agent, PROMPTS[1], max_tokens=20, stop=(word,))
        assert stopped.text == whole[: whole.index(word)]
        assert stopped.account().finish == "stop"

    def test_what_only_began_like_a_stop_string_is_told_at_the_end(self, build: Build) -> None:
        agent = build()
        whole = answer(agent, PROMPTS[0]).text
        assert answer(agent, PROMPTS[0], stop=(whole[-3:] + "§",)).text == whole

    def test_the_same_again_is_the_same(self, build: Build) -> None:
        agent = build()
        warm = Sampling(temperature=1.0, seed=5)
        assert len({answer(agent, PROMPTS[2], sampling=warm).text for _ in range(3)}) == 1


class TestSeveral:
    def test_at_once_equal_each_alone(self, build: Build) -> None:
        agent = build()
        alone = [answer(agent, prompt).text for prompt in PROMPTS]
        together = [ask(agent, Request(prompt, max_tokens=12)) for prompt in PROMPTS]
        for listener in together:
            listener.account()
        assert [listener.text for listener in together] == alone

    def test_at_once_equal_each_alone_with_a_long_prompt_among_them(self, build: Build) -> None:
        agent = build()
        prompts = (PROMPTS[0] * 20, PROMPTS[1], PROMPTS[2])
        alone = [answer(agent, prompt).text for prompt in prompts]
        together = [ask(agent, Request(prompt, max_tokens=12)) for prompt in prompts]
        for listener in together:
            listener.account()
        assert [listener.text for listener in together] == alone

    def test_more_than_there_are_places_take_turns(self, build: Build) -> None:
        agent = build(queue=16)
        listeners = [ask(agent, Request(PROMPTS[0], max_tokens=4)) for _ in range(3 * SEQUENCES)]
        assert len({listener.account().tokens for listener in listeners}) == 1
        assert (agent.scheduler.active, agent.scheduler.queued) == (0, 0)

    def test_a_second_request_is_fed_only_what_is_new(self, build: Build, engine: Engine) -> None:
        agent = build()
        fed: list[int] = []
        forward = engine.forward

        def counted(feeds):  # type: ignore[no-untyped-def]
            fed.append(sum(len(tokens) for _, tokens in feeds))
            return forward(feeds)

        engine.forward = counted  # type: ignore[method-assign]
        try:
            prompt = "Skerry is a rocky island. " * 8
            answer(agent, prompt, max_tokens=1)
            first = sum(fed)
            answer(agent, prompt + "It is", max_tokens=1)
            assert sum(fed) - first < 8 < first
        finally:
            engine.forward = forward  # type: ignore[method-assign]


class TestLimits:
    def test_a_full_queue_is_overloaded(self, build: Build) -> None:
        agent = build(queue=1)
        held = Listener(hold=True)
        writings = [agent.submit(Request(PROMPTS[0], max_tokens=250), held)]
        assert held.began.wait(PATIENCE)
        more = (agent.submit(Request(PROMPTS[0], max_tokens=250), Listener()) for _ in range(SEQUENCES + 2))
        with pytest.raises(Overloaded) as caught:
            writings.extend(more)
        assert caught.value.retry_after > 0.0
        for writing in writings:
            writing.cancel()
        held.go_on.set()

    def test_without_a_queue_free_places_are_given_all_the_same(self, build: Build) -> None:
        assert answer(build(queue=0), PROMPTS[0], max_tokens=2).account().tokens == 2

    def test_what_can_never_fit_is_context_full(self, build: Build) -> None:
        agent = build()
        with pytest.raises(ContextFull, match=str(CONTEXT)):
            ask(agent, Request("word " * (CONTEXT + 1), max_tokens=10))
        with pytest.raises(ContextFull):
            ask(agent, Request("word", max_tokens=CONTEXT))
        assert answer(agent, PROMPTS[0], max_tokens=2).account().tokens == 2

    def test_an_answer_may_fill_the_context(self, build: Build, engine: Engine) -> None:
        agent = build()
        prompt = "one two " * ((CONTEXT - 20) // 2)
        room = CONTEXT - len(agent.encode(prompt))
        assert 0 < room < 30
        account = answer(agent, prompt, max_tokens=room).account()
        assert (account.tokens, account.finish) == (room, "length")

    def test_a_model_without_a_template_refuses_messages(
        self, build: Build, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine.tokenizer, "template", None)
        with pytest.raises(RequestError, match="chat template"):
            ask(build(), Request([Message("user", "hi")]))


class TestCancelling:
    @staticmethod
    def is_given_a_place(agent: Agent) -> bool:
        """Whether there is room for an answer that needs nearly all of it."""
        listener = Listener()
        writing = agent.submit(Request(PROMPTS[0], max_tokens=CONTEXT - 20), listener)
        began = listener.began.wait(PATIENCE)
        writing.cancel()
        return began

    def test_frees_the_place(self, build: Build) -> None:
        agent = build()
        held = [Listener(hold=True) for _ in range(SEQUENCES)]
        writings = [agent.submit(Request(PROMPTS[0], max_tokens=90), listener) for listener in held]
        for writing in writings:
            writing.cancel()
        for listener in held:
            listener.go_on.set()
        assert {listener.account().finish for listener in held} == {"cancelled"}
        assert all(listener.account().tokens < 90 for listener in held)
        assert self.is_given_a_place(agent)

    def test_of_one_that_waits_in_the_queue(self, build: Build) -> None:
        agent = build()
        held = Listener(hold=True)
        first = agent.submit(Request(PROMPTS[0], max_tokens=CONTEXT - 20), held)
        assert held.began.wait(PATIENCE)
        queued = Listener()
        agent.submit(Request(PROMPTS[0], max_tokens=CONTEXT - 20), queued).cancel()
        first.cancel()
        held.go_on.set()
        assert queued.account().finish == "cancelled"
        assert queued.pieces == []

    def test_twice_or_afterwards_is_nothing(self, build: Build) -> None:
        agent = build()
        listener = Listener()
        writing = agent.submit(Request(PROMPTS[0], max_tokens=2), listener)
        assert listener.account().finish == "length"
        writing.cancel()
        writing.cancel()
        assert answer(agent, PROMPTS[1], max_tokens=2).account().finish == "length"

    def test_by_leaving_the_stream(self, build: Build) -> None:
        async def leave(agent: Agent) -> None:
            async with aclosing(agent.stream(Request(PROMPTS[0], max_tokens=CONTEXT - 20))) as events:
                async for _ in events:
                    break

        agent = build()
        asyncio.run(asyncio.wait_for(leave(agent), PATIENCE))
        assert self.is_given_a_place(agent)

    def test_streams_all_of_it(self, build: Build) -> None:
        async def listen(agent: Agent) -> list[Piece | Account]:
            return [event async for event in agent.stream(Request(PROMPTS[0], max_tokens=5))]

        *pieces, account = asyncio.run(asyncio.wait_for(listen(build()), PATIENCE))
        assert [type(piece) for piece in pieces] == [Piece] * 5
        assert isinstance(account, Account)

    def test_closing_ends_what_is_under_way(self, build: Build) -> None:
        agent = build()
        listeners = [ask(agent, Request(PROMPTS[0], max_tokens=250)) for _ in range(3)]
        agent.scheduler.close()
        for listener in listeners:
            with pytest.raises(Overloaded):
                listener.account()
        with pytest.raises(Overloaded):
            ask(agent, Request(PROMPTS[0]))


class Broken(Policy):
    threshold = 0.5

    def decide(self, u: float, seed: int, position: int) -> Decision:
        if seed == 13 and position == 3:
            raise ZeroDivisionError("broken")
        return ThresholdPolicy(1.0).decide(u, seed, position)


class TestFailures:
    def test_one_leaves_the_others(self, build: Build) -> None:
        agent = build(Broken(), resolver=ScriptedResolver(lambda question: says(question.draft)))
        alone = answer(agent, PROMPTS[1]).text
        bad = ask(agent, Request(PROMPTS[0], max_tokens=12, sampling=Sampling(seed=13)))
        good = ask(agent, Request(PROMPTS[1], max_tokens=12))
        with pytest.raises(ZeroDivisionError):
            bad.account()
        good.account()
        assert good.text == alone
        assert len(bad.pieces) == 3

    def test_of_a_listener_leave_the_others(self, build: Build) -> None:
        def deaf(event: Event) -> None:
            raise BrokenPipeError("nobody listens")

        agent = build()
        agent.submit(Request(PROMPTS[0], max_tokens=5), deaf)
        assert answer(agent, PROMPTS[1]).account().tokens == 12

    def test_of_a_resolver_leave_the_others(self, build: Build) -> None:
        class Absent(ScriptedResolver):
            def open(self, *args: object) -> Conversation:
                raise OSError("no resolver")

        agent = build(resolver=Absent(lambda question: None))
        listener = ask(agent, Request(PROMPTS[0], max_tokens=5))
        with pytest.raises(OSError, match="no resolver"):
            listener.account()
        assert answer(agent, PROMPTS[1], private=True).account().tokens == 12


class TestResolver:
    def test_helps_where_the_policy_says_so(self, build: Build) -> None:
        resolver = ScriptedResolver(lambda question: says(question.draft))
        agent = build(ThresholdPolicy(-1.0), resolver=resolver)
        account = answer(agent, PROMPTS[0]).account()
        assert account.counts == {"local": 0, "memory": 0, "peer": 0, "cloud": 12, "fallback": 0}
        assert account.asked == 12
        assert [conversation.closed for conversation in resolver.opened] == [1]

    def test_never_learns_what_is_private(self, build: Build) -> None:
        resolver = ScriptedResolver(lambda question: says(question.draft))
        agent = build(ThresholdPolicy(-1.0), resolver=resolver)
        account = answer(agent, PROMPTS[0], private=True).account()
        assert resolver.opened == []
        assert account.counts["local"] == 12

    def test_that_fails_costs_nothing_but_provenance(self, build: Build) -> None:
        agent = build(ThresholdPolicy(-1.0), resolver=ScriptedResolver(lambda question: None))
        helped, alone = (answer(agent, PROMPTS[0], private=private) for private in (False, True))
        assert helped.text == alone.text
        assert helped.account().counts["fallback"] == 12

    @pytest.mark.parametrize("mode", ["verify", "fuse", "take"])
    def test_works_in_the_mode_that_is_asked_for(self, build: Build, mode: Mode) -> None:
        resolver = ScriptedResolver(lambda question: says(question.draft, {question.draft: 0.9}, 0.9))
        agent = build(ThresholdPolicy(-1.0), resolver=resolver)
        account = answer(agent, PROMPTS[0], mode=mode).account()
        assert (account.mode, account.counts["cloud"]) == (mode, 12)


class TestEngineFailure:
    """An engine that raises what nobody expected."""

    def test_fails_the_answer_and_serves_the_next(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        agent = Agent(engine, Options(ThresholdPolicy(1.0)))
        request = Request("The capital of France", max_tokens=2)

        async def ask() -> int:
            return sum([1 async for event in agent.stream(request) if isinstance(event, Piece)])

        def broken(feeds: object) -> list[Step]:
            raise ValueError("NULL pointer access")

        with monkeypatch.context() as patch:
            patch.setattr(engine, "forward", broken)
            with pytest.raises(ValueError, match="NULL pointer"):
                asyncio.run(ask())
        assert agent.scheduler.alive
        assert asyncio.run(ask()) == 2
        agent.scheduler.close()
        assert not agent.scheduler.alive
