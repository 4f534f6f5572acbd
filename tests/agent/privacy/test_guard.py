"""What others may hear of one request, with a real tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from agent.privacy import Guard, Outcome, Privacy
from agent.resolver import Question, Reach
from models.engine.base import Tokenizer
from models.engine.gguf import GgufTokenizer
from models.sampling import Shaped
from protocol.resolve import Message, Mode, Sampling
from tests.agent.scripted import ScriptedResolver, says

ANNA = "My name is Anna Keller, write to anna.keller@example.org."


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return GgufTokenizer.open(smollm2)


MakeGuard = Callable[..., Guard]


@pytest.fixture(scope="module")
def guard(tokenizer: Tokenizer) -> MakeGuard:
    both: dict[str, Privacy] = {}

    def make(*texts: str, handling: Literal["redact", "local"] = "redact") -> Guard:
        privacy = both.setdefault(handling, Privacy(handling, ["GB"]))
        return privacy.guard([Message("user", text) for text in texts], tokenizer)

    return make


def hears(guard: Guard, tokenizer: Tokenizer, answer: str, draft: str = " and", mode: Mode = "take") -> str | None:
    """The answer as the cloud reads it; None: nobody is asked."""
    tokens = tokenizer.encode(answer)
    x = Shaped(np.zeros(1, np.intp), np.ones(1, np.float32))
    question = Question(tokens, tokenizer.encode(draft)[0], x)
    heard = guard.screened(question, mode)
    if heard.reach is Reach.NOBODY:
        return None
    assert (heard.reach is Reach.CLOUD) is guard.private
    return tokenizer.decode(heard.answer).decode()


def test_what_holds_nothing_goes_as_it_is(guard: MakeGuard, tokenizer: Tokenizer) -> None:
    made = guard("Why is the sky blue?")
    assert (made.outcome, made.private) == (Outcome.FREE, False)
    assert made.prompt == [Message("user", "Why is the sky blue?")]
    assert hears(made, tokenizer, "It scatters") == "It scatters"
    assert made.mode("verify") == "verify"


def test_history_and_system_prompt_are_hidden_consistently(guard: MakeGuard) -> None:
    made = guard("You help Keller.", ANNA, "Hello Anna Keller!")
    assert made.outcome is Outcome.REDACTED
    assert [message.content for message in made.prompt if isinstance(message, Message)] == [
        "You help [NAME_1].",
        "My name is [NAME_1], write to [EMAIL_1].",
        "Hello [NAME_1]!",
    ]
    assert made.mode("verify") == "fuse"
    assert made.mode("take") == "take"


@pytest.mark.parametrize(
    ("answer", "draft", "heard"),
    [
        ("Dear Sir", " and", "Dear Sir"),
        ("I told Anna Keller of it", " and", "I told [NAME_1] of it"),
        ("I told", " Anna", None),
        ("I told Anna", " Keller", None),
        ("I told Anna Keller", " that", None),
        ("It is anna.kel", "ler", None),
        ("It is anna.kel or so", " and", "It is [EMAIL_1] or so"),
        ("His number is 4", "2", None),
    ],
)
def test_what_is_written_is_hidden_as_it_grows(
    guard: MakeGuard, tokenizer: Tokenizer, answer: str, draft: str, heard: str | None
) -> None:
    assert hears(guard(ANNA), tokenizer, answer, draft) == heard


def test_what_the_answer_itself_brings_up_is_hidden_from_then_on(guard: MakeGuard, tokenizer: Tokenizer) -> None:
    made = guard("Make something up.")
    assert hears(made, tokenizer, "Write to", " mira") == "Write to"
    assert hears(made, tokenizer, "Write to mira@example.com", " or") is None
    assert hears(made, tokenizer, "Write to mira@example.com or to", " him") == "Write to [EMAIL_1] or to"
    assert hears(made, tokenizer, "Write to mira@example.com or to", " him", "verify") is None
    assert made.private


def test_kept_here_means_that_nobody_is_asked(guard: MakeGuard, tokenizer: Tokenizer) -> None:
    assert guard(ANNA, handling="local").outcome is Outcome.LOCAL
    made = guard("Make something up.", handling="local")
    assert hears(made, tokenizer, "Well") == "Well"
    assert hears(made, tokenizer, "Write to mira@example.com or to") is None


def test_tokens_outside_of_what_is_hidden_stay_the_same(guard: MakeGuard, tokenizer: Tokenizer) -> None:
    """So that a question never takes an earlier one back."""
    made, words = guard(ANNA), "I wrote to Anna Keller on the very next morning and again in the evening"
    tokens = tokenizer.encode(words)
    x = Shaped(np.zeros(1, np.intp), np.ones(1, np.float32))
    known: list[int] = []
    for length in range(1, len(tokens)):
        heard = made.screened(Question(tokens[:length], tokens[length], x), "take")
        if heard.reach is not Reach.NOBODY:
            assert list(heard.answer[: len(known)]) == known
            known = list(heard.answer)
    assert "[NAME_1] on the very next morning" in tokenizer.decode(known).decode()


def test_a_long_answer_is_not_read_again_from_its_beginning(guard: MakeGuard, tokenizer: Tokenizer) -> None:
    """What has left the window stays hidden, also after drafts were taken back."""
    made, answer = guard(ANNA), "Anna Keller began. " + "The days went by without any news at all. " * 60
    for length in (400, 900, 1500, 2400, 1000, 2400):
        cut = answer[: answer.rfind(" ", 0, length)]
        heard = hears(made, tokenizer, cut)
        assert heard is not None
        assert heard == cut.replace("Anna Keller", "[NAME_1]")


def test_text_that_is_continued_gives_its_cue(tokenizer: Tokenizer) -> None:
    made = Privacy("redact", ["GB"]).guard("My card has the number 4556 7375 86", tokenizer)
    assert made.prompt == "My card has the number [ID_1]"
    assert hears(made, tokenizer, "89 98") is None
    heard = hears(made, tokenizer, "89 9855 and I keep it in", " the")
    assert heard is not None
    assert "89" not in heard


def test_a_conversation_gets_the_hidden_prompt_and_screened_questions(guard: MakeGuard, tokenizer: Tokenizer) -> None:
    resolver = ScriptedResolver(lambda question: says(question.draft))
    made = guard(ANNA)
    conversation = made.open(resolver, Sampling(), "take", lambda: None)
    x = Shaped(np.zeros(1, np.intp), np.ones(1, np.float32))
    asked = Question(tokenizer.encode("I told Anna Keller of it"), tokenizer.encode(" and")[0], x)
    assert conversation.known(asked) is None
    assert conversation.ask(asked) is not None
    assert conversation.ask(Question(tokenizer.encode("I told"), tokenizer.encode(" Anna")[0], x)) is None
    (scripted,) = resolver.opened
    assert [tokenizer.decode(question.answer) for question in scripted.questions] == [b"I told [NAME_1] of it"]
