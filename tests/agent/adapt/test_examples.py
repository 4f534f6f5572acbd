"""Files of labelled examples: what they teach, and which lines are refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from agent.adapt.examples import MAX_LINE, encode_answer, read
from agent.adapt.lesson import Lesson
from models.chat import encode_chat
from models.engine.base import Tokenizer
from models.engine.gguf import GgufTokenizer
from protocol.errors import RequestError, TrainingError
from protocol.resolve import Message

CHAT = [{"role": "user", "content": "What is the capital of Australia?"}]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return GgufTokenizer.open(smollm2)


def lessons(tokenizer: Tokenizer, *lines: Any) -> list[Lesson]:
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return list(read(io.BytesIO(raw), tokenizer, 200, lambda size: None))


def test_every_token_of_the_answer_is_a_label(tokenizer: Tokenizer) -> None:
    (lesson,) = lessons(tokenizer, {"prompt": "The capital of Australia is", "answer": " Canberra."})
    assert tokenizer.decode(lesson.tokens).decode() == "The capital of Australia is Canberra."
    labels = [target.ids[0] for target in lesson.targets]
    assert tokenizer.decode(labels).decode() == " Canberra."
    assert labels[-1] in tokenizer.eog
    assert all(lesson.tokens[target.position] == target.ids[0] for target in lesson.targets)
    assert {target.kind for target in lesson.targets} == {"label"}
    assert (lesson.source, lesson.private, lesson.weight) == ("example", False, 1.0)


def test_a_chat_is_written_as_the_template_writes_it(tokenizer: Tokenizer) -> None:
    (lesson,) = lessons(tokenizer, {"messages": CHAT, "answer": "Canberra.", "private": True, "weight": 2.5})
    prompt = encode_chat(tokenizer, [Message("user", CHAT[0]["content"])])
    assert lesson.tokens[: len(prompt)] == prompt
    assert lesson.targets[0].position == len(prompt)
    assert tokenizer.control(lesson.tokens[-1]) == "<|im_end|>"
    assert (lesson.private, lesson.weight) == (True, 2.5)


def test_the_end_is_that_of_the_template_where_the_model_names_another(smollm2: Path) -> None:
    other = GgufTokenizer.open(smollm2)
    other.end_id = -1
    told = [Message("user", "hello")]
    assert other.control(encode_answer(other, told, "yes")[-1]) == "<|im_end|>"
    assert encode_answer(other, "hello", "yes") == other.encode("yes"), "a text without template and end just goes on"


def test_control_tokens_in_an_answer_stay_text(tokenizer: Tokenizer) -> None:
    (lesson,) = lessons(tokenizer, {"messages": CHAT, "answer": "<|im_end|>"})
    assert len(lesson.targets) > 3
    assert sum(target.ids[0] in tokenizer.eog for target in lesson.targets) == 1


def test_empty_lines_are_passed_over(tokenizer: Tokenizer) -> None:
    line = {"prompt": "a", "answer": "b"}
    assert len(lessons(tokenizer, line, b"", b"  \r", line, b"")) == 2


BAD = {
    "no JSON": b"{prompt",
    "no object": b"[1]",
    "half a character": b'{"prompt": "a", "answer": "\xc3"}',
    "half a surrogate": b'{"prompt": "a", "answer": "\\ud800"}',
    "deep": b'{"answer":' + b"[" * 100_000,
    "no answer": {"prompt": "a"},
    "an empty answer": {"prompt": "a", "answer": ""},
    "an answer of numbers": {"prompt": "a", "answer": [1, 2]},
    "nothing asked": {"answer": "a"},
    "asked twice": {"prompt": "a", "messages": CHAT, "answer": "a"},
    "no messages": {"messages": [], "answer": "a"},
    "an unknown role": {"messages": [{"role": "root", "content": "a"}], "answer": "a"},
    "a misspelt key": {"prompt": "a", "answer": "a", "privat": True},
    "no weight": {"prompt": "a", "answer": "a", "weight": 0},
    "a negative weight": {"prompt": "a", "answer": "a", "weight": -1},
    "an absurd weight": {"prompt": "a", "answer": "a", "weight": 1e300},
    "a weight that is no number": b'{"prompt": "a", "answer": "a", "weight": NaN}',
    "too many tokens": {"prompt": "a b c d " * 100, "answer": "a"},
    "too many bytes": b'{"prompt": "a", "answer": "' + b"a" * 2 * MAX_LINE + b'"}',
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named(tokenizer: Tokenizer, bad: str) -> None:
    good = {"prompt": "a", "answer": "b"}
    with pytest.raises(TrainingError) as raised:
        lessons(tokenizer, good, BAD[bad], good)
    first, second = str(raised.value).split("\n")
    assert first.startswith("no lesson was kept")
    assert second.startswith("line 2: ")


def test_all_bad_lines_are_counted_and_the_first_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(TrainingError) as raised:
        lessons(tokenizer, *[{"prompt": "a"}] * 50)
    told = str(raised.value).split("\n")
    assert [line.partition(":")[0] for line in told[1:-1]] == [f"line {number}" for number in range(1, 21)]
    assert told[-1] == "and 30 more"


def test_all_bytes_are_told_of(tokenizer: Tokenizer) -> None:
    told: list[int] = []
    raw = b'{"prompt": "a", "answer": "b"}\n\n' + b"x" * 3 * MAX_LINE + b"\nend"
    with pytest.raises(TrainingError, match=r"line 3: over .*\nline 4: "):
        list(read(io.BytesIO(raw), tokenizer, 100, told.append))
    assert sum(told) == len(raw)


def test_nothing_to_write_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="empty"):
        encode_answer(tokenizer, "a", "")
