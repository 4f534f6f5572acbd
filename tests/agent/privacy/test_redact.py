"""Placeholders, and the way back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.privacy import Kind
from agent.privacy.redact import Redaction, Restoring
from agent.text import TextStream


def redaction() -> Redaction:
    made = Redaction()
    made.add("Anna Keller", Kind.NAME)
    made.add("+44 20 7946 0958", Kind.PHONE)
    made.add("hunter2-quasar", Kind.SECRET)
    return made


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Dear Anna Keller,", "Dear [NAME_1],"),
        ("Dear Anna, dear Mrs Keller", "Dear [NAME_1], dear Mrs [NAME_1]"),
        ("ANNA KELLER, annals, the will", "[NAME_1], annals, the will"),
        ("or 020 7946 0958.", "or [PHONE_1]."),
        ("digits 2.0.7.9.4.6", "digits [PHONE_1]"),
        ("it was hunter2-qua and no more", "it was [SECRET_1] and no more"),
        ("in 1998", "in 1998"),
    ],
)
def test_a_value_is_known_in_other_ways_of_writing_and_in_part(text: str, hidden: str) -> None:
    assert redaction().redact(text, []) == hidden


def test_one_value_has_one_placeholder_and_none_that_the_text_has_already() -> None:
    made = Redaction(["what is [EMAIL_1]?"])
    assert made.add("a@b.de", Kind.EMAIL) == made.add("A@B.de", Kind.EMAIL) == "[EMAIL_2]"
    assert made.add("c@b.de", Kind.EMAIL) == "[EMAIL_3]"


@pytest.mark.parametrize("text", ["Dear A", "Dear Anna Kell", "Dear Anna Keller", "is hunt"])
def test_a_beginning_at_the_end_is_seen(text: str) -> None:
    at = redaction().beginning(text)
    assert at is not None
    assert text[at:] in ("A", "Anna Kell", "Anna Keller", "Keller", "hunt")
    assert redaction().beginning(text + " and so") is None


@given(st.lists(st.sampled_from(["[NAME_1]", "[", "[NAME_", "1]", "x", "[NAME_12]", "]", " "]), max_size=12), st.data())
def test_restoring_does_not_depend_on_how_the_text_is_cut(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    restoring, shown = Restoring(redaction()), ""
    while text:
        cut = data.draw(st.integers(1, len(text)))
        shown += restoring.push(text[:cut])
        text = text[cut:]
    shown += restoring.push("", final=True)
    assert shown == "".join(parts).replace("[NAME_1]", "Anna Keller")


def test_stop_strings_are_those_of_the_restored_text() -> None:
    stream = TextStream(["Keller!"], Restoring(redaction()))
    assert [stream.push(piece) for piece in (b"Hi [NA", b"ME_", b"1]", b"! more")] == ["Hi ", "", "Anna ", ""]
    assert stream.stopped
