"""The token loop over the real engine, with a resolver whose replies and timing the test decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from agent.agreement import Agreement
from agent.loop import Plan
from agent.policy import ThresholdPolicy, Why
from agent.resolver import Question, Reply
from models.chat import render
from models.engine.base import Engine
from models.engine.gguf import GgufEngine
from protocol.resolve import Message, Sampling
from tests.agent.scripted import Clock, Opinion, Run, Scripted, done, says

ALWAYS, NEVER = ThresholdPolicy(-1.0), ThresholdPolicy(1.0)
SOMETIMES = ThresholdPolicy(0.2)
WARM = Sampling(temperature=1.0, top_k=0, seed=7)
LENGTH = 15


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    engine = GgufEngine(smollm2, context=1024, sequences=2, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plan(policy: ThresholdPolicy = ALWAYS, sampling: Sampling = Sampling(), **options: object) -> Plan:  # noqa: B008
    return Plan(**({"sampling": sampling, "max_tokens": LENGTH, "policy": policy} | options))  # type: ignore[arg-type]


@pytest.fixture
def alone(engine: Engine, prompt: list[int]) -> Callable[..., list[int]]:
    """What the model writes by itself: a plain loop of its own. `forced`: tokens that are put in its mouth."""

    def write(forced: dict[int, int] | None = None, count: int = LENGTH) -> list[int]:
        place = engine.open(prompt, count)
        place.rewind(0)
        answer: list[int] = []
        (step,) = engine.forward([(place, prompt)])
        for position in range(count):
            answer.append((forced or {}).get(position, int(step.logits.argmax())))
            if answer[-1] in engine.tokenizer.eog:
                break
            (step,) = engine.forward([(place, answer[-1:])])
        place.rewind(0)
        place.close()
        return answer

    return write


def trusting() -> Agreement:
    """As after many replies that agreed: as much is asked ahead as is allowed."""
    agreement = Agreement()
    agreement.rate = 1.0
    return agreement


def agrees(question: Question) -> Reply:
    return says(question.draft)


def fails(question: Question) -> None:
    return None


def replaces(at: dict[int, int]) -> Opinion:
    """Agrees, but for the tokens at these positions."""
    return lambda question: says(at.get(len(question.answer), question.draft))


def stubborn(share: float, other: Sequence[int]) -> Opinion:
    """Disagrees with a share of the drafts, depending on nothing but the answer so far."""

    def opinion(question: Question) -> Reply:
        dice = random.Random(hash(tuple(question.answer)))
        return says(dice.choice(other) if dice.random() < share else question.draft)

    return opinion


def answer_first(run: Run) -> None:
    assert run.conversation is not None
    run.conversation.answer(run.conversation.open_questions()[0])


def answer_last(run: Run) -> None:
    """The latest question first: replies arrive in the wrong order."""
    assert run.conversation is not None
    run.conversation.answer(run.conversation.open_questions()[-1])


def wait_for_deadline(run: Run) -> None:
    run.clock.now += 0.3


class TestAlone:
    def test_is_plain_greedy(
        self, engine: Engine, prompt: list[int], clock: Clock, alone: Callable[..., list[int]]
    ) -> None:
        run = Run(engine, plan(), None, clock)(prompt)
        assert run.ids == alone()
        assert run.provenance == ["local"] * LENGTH
        assert run.finish == "length"
        assert (run.waits, run.loop.rewinds) == (0, 0)
        assert run.fed == len(prompt) + LENGTH - 1

    def test_nothing_is_asked_below_the_threshold(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        conversation = Scripted(fails, clock)
        run = Run(engine, plan(NEVER), conversation, clock)(prompt)
        assert conversation.questions == []
        assert run.provenance == ["local"] * LENGTH

    @pytest.mark.parametrize("length", [1, 2, 7])
    def test_max_tokens_is_exact(self, engine: Engine, prompt: list[int], clock: Clock, length: int) -> None:
        run = Run(engine, plan(max_tokens=length), None, clock)(prompt)
        assert (len(run.emitted), run.finish) == (length, "length")

    def test_the_same_seed_writes_the_same(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        texts = [Run(engine, plan(sampling=Sampling(1.0, 0, seed=seed)), None, clock)(prompt).ids for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_ends_with_the_models_end(self, engine: Engine, clock: Clock) -> None:
        text = render(engine.tokenizer, [Message("user", "Say hi.")])
        run = Run(engine, plan(max_tokens=60), None, clock)(engine.tokenizer.encode(text, special=True))
        assert run.finish == "stop"
        assert run.ids[-1] in engine.tokenizer.eog
        assert not engine.tokenizer.eog.intersection(run.ids[:-1])

    def test_stops_when_told_to(
        self, engine: Engine, prompt: list[int], clock: Clock, alone: Callable[..., list[int]]
    ) -> None:
        wanted = alone()
        run = Run(engine, plan(), None, clock, stop_at=wanted[4])(prompt)
        assert run.ids == wanted[: wanted.index(wanted[4]) + 1]
        assert run.finish == "stop"

    def test_notes_what_was_asked_for(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        run = Run(engine, plan(top=3), None, clock)(prompt)
        for token in run.emitted:
            ids, log_p = zip(*token.top, strict=True)
            assert ids[0] == token.id
            assert list(log_p) == sorted(log_p, reverse=True)
            assert np.exp(log_p[0]) == pytest.approx(token.p, rel=1e-4)
            assert 0.0 <= token.u <= 1.0


class TestAgreement:
    @pytest.mark.parametrize("ahead", [0, 1, 4, 64])
    @pytest.mark.parametrize("on_wait", [answer_first, answer_last])
    def test_changes_nothing(
        self,
        engine: Engine,
        prompt: list[int],
        clock: Clock,
        alone: Callable[..., list[int]],
        ahead: int,
        on_wait: Callable[[Run], None],
    ) -> None:
        conversation = Scripted(agrees, clock)
        run = Run(engine, plan(ahead=ahead), conversation, clock, on_wait)(prompt)
        assert run.ids == alone()
        assert run.provenance == ["cloud"] * LENGTH
        assert run.loop.rewinds == 0
        assert run.fed == len(prompt) + LENGTH - 1
        assert len(conversation.questions) == LENGTH

    def test_in_time_never_stops_the_stream(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        run = Run(engine, plan(), Scripted(agrees, clock, prompt=True), clock)(prompt)
        assert run.waits == 0
        assert run.furthest <= 1

    def test_questions_tell_the_answer_so_far(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        conversation = Scripted(agrees, clock)
        run = Run(engine, plan(), conversation, clock, answer_first)(prompt)
        for position, question in enumerate(conversation.questions):
            assert list(question.answer) == run.ids[:position]
            assert question.draft == run.ids[position]
            assert question.x.at(question.draft) == 1.0


class TestDisagreement:
    @pytest.mark.parametrize("ahead", [0, 3, 64])
    def test_the_rest_is_what_the_model_writes_after_it(
        self,
        engine: Engine,
        prompt: list[int],
        clock: Clock,
        word: int,
        alone: Callable[..., list[int]],
        ahead: int,
    ) -> None:
        forced = {0: word, 5: word, 6: word}
        run = Run(engine, plan(ahead=ahead), Scripted(replaces(forced), clock), clock, answer_first)(prompt)
        assert run.ids == alone(forced)
        assert run.loop.rewinds == len(forced)
        assert [at for at, token in enumerate(run.emitted) if token.id != token.draft] == sorted(forced)

    def test_the_last_token_may_be_replaced_too(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        conversation = Scripted(replaces({3: word}), clock)
        run = Run(engine, plan(max_tokens=4), conversation, clock, answer_first)(prompt)
        assert run.ids == alone({3: word}, 4)
        assert run.finish == "length"

    def test_only_unsure_steps_are_asked(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        def opinion(question: Question) -> Reply:
            return says(word if len(question.answer) >= 3 and word not in question.answer else question.draft)

        run = Run(engine, plan(SOMETIMES), Scripted(opinion, clock), clock, answer_first)(prompt)
        assert run.ids == alone({run.ids.index(word): word})
        assert [who == "cloud" for who in run.provenance] == [token.u > 0.2 for token in run.emitted]
        assert [token.why is Why.ESCALATE for token in run.emitted] == [token.u > 0.2 for token in run.emitted]
        assert set(run.provenance) == {"local", "cloud"}

    def test_questions_of_what_was_dropped_change_nothing(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        def opinion(question: Question) -> Reply:
            first = question.answer[:1] == [word]
            return says(question.draft if first else word)

        def answer_all(run: Run) -> None:
            assert run.conversation is not None
            for index in reversed(run.conversation.open_questions()):
                run.conversation.answer(index)

        run = Run(engine, plan(), Scripted(opinion, clock), clock, answer_all)(prompt)
        assert run.ids == alone({0: word})

    def test_questions_of_what_was_dropped_are_withdrawn(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int
    ) -> None:
        conversation = Scripted(replaces({0: word}), clock)
        run = Run(engine, plan(max_tokens=6), conversation, clock, answer_first, trusting())(prompt)
        assert len(conversation.withdrawn) == 5
        assert all(not done(ticket) for ticket in conversation.withdrawn)
        assert len(conversation.questions) == 5 + len(run.ids)

    def test_the_llm_ends_the_answer(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        end = engine.tokenizer.end_id
        conversation = Scripted(replaces({4: end}), clock)
        run = Run(engine, plan(), conversation, clock, answer_first)(prompt)
        assert (len(run.emitted), run.ids[-1], run.finish) == (5, end, "stop")
        assert run.provenance[-1] == "cloud"

    def test_the_llm_goes_on_where_the_slm_would_end(self, engine: Engine, clock: Clock, word: int) -> None:
        text = render(engine.tokenizer, [Message("user", "Say hi.")])
        chat = engine.tokenizer.encode(text, special=True)
        short = Run(engine, plan(max_tokens=60), None, clock)(chat)
        at = len(short.ids) - 1
        conversation = Scripted(replaces({at: word}), clock)
        run = Run(engine, plan(max_tokens=60), conversation, clock, answer_first)(chat)
        assert run.ids[: at + 1] == [*short.ids[:-1], word]
        assert len(run.ids) > at + 1

    def test_beta_is_how_likely_the_draft_was_refused(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int
    ) -> None:
        def opinion(question: Question) -> Reply:
            return says(word, {word: 0.9, question.draft: 0.01}, y_draft=0.01)

        run = Run(engine, plan(max_tokens=4), Scripted(opinion, clock), clock, answer_first)(prompt)
        alone = Run(engine, plan(max_tokens=1), None, clock)(prompt)
        assert run.emitted[0].beta == pytest.approx(max(0.0, 1.0 - 0.01 / alone.emitted[0].p))
        assert run.emitted[0].p == pytest.approx(0.9)


class TestTiming:
    def test_several_are_in_flight_at_once(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        conversation = Scripted(agrees, clock)
        most = 0

        def count(run: Run) -> None:
            nonlocal most
            most = max(most, len(conversation.open_questions()))
            answer_first(run)

        Run(engine, plan(in_flight=5), conversation, clock, count, trusting())(prompt)
        assert most == 5

    def test_asks_less_ahead_while_replies_disagree(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        agreement = trusting()
        for _ in range(200):
            agreement.observe(agreed=False)
        conversation = Scripted(agrees, clock)

        def world(run: Run) -> None:
            assert len(conversation.open_questions()) == 1
            answer_first(run)

        Run(engine, plan(max_tokens=5), conversation, clock, world, agreement)(prompt)

    @pytest.mark.parametrize("ahead", [0, 1, 3])
    def test_drafts_no_further_ahead_than_told(
        self, engine: Engine, prompt: list[int], clock: Clock, ahead: int
    ) -> None:
        run = Run(engine, plan(ahead=ahead), Scripted(agrees, clock), clock, answer_first, trusting())(prompt)
        assert run.furthest == ahead + 1
        if ahead == 0:
            assert run.waits == LENGTH

    @pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(0.8, 40, repetition_penalty=1.3, seed=3)])
    @pytest.mark.parametrize("on_wait", [answer_first, answer_last])
    def test_drafting_ahead_writes_what_blocking_writes(
        self, engine: Engine, prompt: list[int], clock: Clock, sampling: Sampling, on_wait: Callable[[Run], None]
    ) -> None:
        other = engine.tokenizer.encode(" the a one of and not", start=False)
        runs = [
            Run(engine, plan(SOMETIMES, sampling, ahead=ahead), Scripted(stubborn(0.4, other), clock), clock, wait)(
                prompt
            )
            for ahead, wait in ((0, answer_first), (32, on_wait))
        ]
        assert runs[0].ids == runs[1].ids
        assert runs[0].provenance == runs[1].provenance
        assert runs[1].loop.rewinds > 0

    @pytest.mark.parametrize("seed", range(4))
    def test_replies_in_any_order_and_late(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, seed: int
    ) -> None:
        dice = random.Random(seed)
        other = [word, *engine.tokenizer.encode(" of the")]
        conversation = Scripted(stubborn(0.3, other), clock, deadline=1.0)

        def world(run: Run) -> None:
            clock.now += dice.uniform(0.0, 0.7)
            undone = [index for index, ticket in enumerate(conversation.tickets) if not done(ticket)]
            if undone and dice.random() < 0.7:  # also those that were given up
                conversation.answer(dice.choice(undone))

        run = Run(engine, plan(), conversation, clock, world)(prompt)
        assert run.snapshots == [(token.id, str(token.provenance)) for token in run.emitted]
        assert run.emitted == run.loop.tokens
        assert set(run.provenance) <= {"cloud", "fallback"}
        for token in run.emitted:
            assert token.provenance != "fallback" or token.id == token.draft
            assert token.wait <= 1.0 + 0.7

    def test_a_reply_after_the_deadline_is_dropped(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        conversation = Scripted(lambda question: says(word), clock)

        def world(run: Run) -> None:
            for index, ticket in enumerate(conversation.tickets):
                if ticket in conversation.given_up and not done(ticket):
                    conversation.answer(index)
            clock.now = max(clock.now, *(ticket.deadline for ticket in conversation.tickets))

        run = Run(engine, plan(), conversation, clock, world)(prompt)
        assert run.ids == alone()
        assert run.provenance == ["fallback"] * LENGTH

    def test_waits_no_longer_than_the_deadline(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        conversation = Scripted(agrees, clock, deadline=1.0)
        run = Run(engine, plan(ahead=0), conversation, clock, wait_for_deadline)(prompt)
        assert all(1.0 <= token.wait < 1.3 for token in run.emitted)
        assert conversation.given_up == conversation.tickets

    def test_drafting_ahead_waits_once_for_many(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        conversation = Scripted(agrees, clock, deadline=1.0)
        began = clock.now
        Run(engine, plan(ahead=64, in_flight=10), conversation, clock, wait_for_deadline, trusting())(prompt)
        assert clock.now - began < LENGTH / 10 * 1.5 + 0.3


class TestFallback:
    @pytest.mark.parametrize("sampling", [Sampling(), WARM])
    @pytest.mark.parametrize("how", ["deaf", "failing", "silent"])
    def test_is_what_the_slm_writes_alone(
        self, engine: Engine, prompt: list[int], clock: Clock, how: str, sampling: Sampling
    ) -> None:
        conversation = Scripted(fails, clock, prompt=how == "failing", deaf=how == "deaf")
        run = Run(engine, plan(sampling=sampling), conversation, clock, wait_for_deadline)(prompt)
        alone = Run(engine, plan(sampling=sampling), None, clock)(prompt)
        assert run.ids == alone.ids
        assert run.provenance == ["fallback"] * LENGTH
        assert [token.p for token in run.emitted] == [token.p for token in alone.emitted]
        assert run.finish == "length"

    def test_goes_over_into_help_again(self, engine: Engine, prompt: list[int], clock: Clock) -> None:
        def opinion(question: Question) -> Reply | None:
            return None if 5 <= len(question.answer) < 9 else says(question.draft)

        run = Run(engine, plan(), Scripted(opinion, clock), clock, answer_first)(prompt)
        assert run.provenance == ["cloud"] * 5 + ["fallback"] * 4 + ["cloud"] * (LENGTH - 9)


class TestBurst:
    @staticmethod
    def with_burst(burst: list[int], at: int, token: int | None = None) -> tuple[Opinion, Callable[[Run], None]]:
        """Answers position `at` with `token` (None: the draft) and goes on with `burst`; agrees elsewhere."""

        def opinion(question: Question) -> Reply:
            return says(token if token is not None and len(question.answer) == at else question.draft)

        def world(run: Run) -> None:
            assert run.conversation is not None
            index = run.conversation.open_questions()[0]
            run.conversation.answer(index)
            if len(run.conversation.questions[index].answer) == at:
                run.conversation.tickets[index].burst.extend(burst)

        return opinion, world

    @pytest.mark.parametrize("ahead", [0, 8])
    def test_is_used_without_asking_again(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]], ahead: int
    ) -> None:
        opinion, world = self.with_burst([word, word, word], at=2, token=word)
        conversation = Scripted(opinion, clock)
        run = Run(engine, plan(ahead=ahead), conversation, clock, world)(prompt)
        assert run.ids == alone({2: word, 3: word, 4: word, 5: word})
        assert run.provenance == ["cloud"] * LENGTH
        asked_after = [q for q in conversation.questions if list(q.answer[:3]) == run.ids[:3]]
        assert len(asked_after) == LENGTH - 6

    def test_settles_questions_that_are_under_way(
        self, engine: Engine, prompt: list[int], clock: Clock, alone: Callable[..., list[int]]
    ) -> None:
        wanted = alone()
        opinion, world = self.with_burst(wanted[1:8], at=0)
        conversation = Scripted(opinion, clock)
        run = Run(engine, plan(), conversation, clock, world)(prompt)
        assert run.ids == wanted
        assert run.provenance == ["cloud"] * LENGTH
        assert [at for at, token in enumerate(run.emitted) if token.reply_seconds is None] == list(range(1, 8))

    def test_is_handed_back_where_the_slm_is_sure(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int
    ) -> None:
        opinion, world = self.with_burst([word] * 10, at=0, token=word)
        run = Run(engine, plan(SOMETIMES), Scripted(opinion, clock), clock, world)(prompt)
        local = run.provenance.index("local") if "local" in run.provenance else LENGTH
        assert all(token.u <= 0.2 for token in run.emitted if token.provenance == "local")
        assert run.ids[1 : min(local, 11)] == [word] * (min(local, 11) - 1)

    def test_is_dropped_where_the_answer_took_another_way(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        wanted = alone()
        # The LLM would go on with these; the SLM is sure of each token, so its own are taken and nothing more is.
        sure = ThresholdPolicy(max(t.u for t in Run(engine, plan(), None, clock)(prompt).emitted[1:]))
        opinion, world = self.with_burst([word] * 10, at=0)
        run = Run(engine, plan(sure), Scripted(opinion, clock), clock, world)(prompt)
        assert run.ids == wanted

    def test_that_comes_later_than_the_drafts_still_counts(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        wanted = alone()
        conversation = Scripted(agrees, clock)

        def world(run: Run) -> None:
            """First the answer alone, then its burst, token by token."""
            first = conversation.tickets[0]
            if first.reply is None:
                conversation.answer(0)
            elif len(first.burst) < LENGTH - 1:
                first.burst.append(wanted[len(first.burst) + 1])

        run = Run(engine, plan(in_flight=4), conversation, clock, world)(prompt)
        assert run.ids == wanted
        assert sum(ticket.reply is not None for ticket in conversation.tickets) == 1

    def test_ends_the_answer(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        end = engine.tokenizer.end_id
        opinion, world = self.with_burst([word, end], at=1, token=word)
        run = Run(engine, plan(), Scripted(opinion, clock), clock, world)(prompt)
        assert run.ids == [*alone({1: word, 2: word}, 3), end]
        assert run.finish == "stop"


class TestFuse:
    def test_with_all_weight_on_the_slm_equals_it(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int, alone: Callable[..., list[int]]
    ) -> None:
        conversation = Scripted(lambda question: says(word, {word: 1.0}), clock)
        run = Run(engine, plan(mode="fuse", weight=1.0), conversation, clock, answer_first)(prompt)
        assert run.ids == alone()

    def test_with_all_weight_on_the_llm_equals_that(
        self, engine: Engine, prompt: list[int], clock: Clock, word: int
    ) -> None:
        def opinion(question: Question) -> Reply:
            reply = says(word, {word: 0.9})
            return Reply([], [], reply.y_ids, reply.y_p, -1.0)

        conversation = Scripted(opinion, clock)
        run = Run(engine, plan(mode="fuse", weight=0.0, max_tokens=5), conversation, clock, answer_first)(prompt)
        assert run.ids == [word] * 5
