"""Notes that a user keeps to himself, and questions that need the note, general knowledge, or both. Generated."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from protocol.resolve import Message

Kind = Literal["private", "general", "both"]

KINDS: tuple[Kind, ...] = ("private", "general", "both")

_NAMES = ("Amara", "Bjarne", "Chiyo", "Dario", "Edda", "Farid", "Greta", "Hugo", "Ilse", "Jonas")
_LANDS = (
    ("Portugal", "Lisbon"),
    ("Norway", "Oslo"),
    ("Japan", "Tokyo"),
    ("Egypt", "Cairo"),
    ("Austria", "Vienna"),
    ("Peru", "Lima"),
    ("Greece", "Athens"),
    ("Kenya", "Nairobi"),
)
_DISHES = ("lentil soup", "fish pie", "mushroom risotto", "vegetable curry", "potato gratin", "bean stew")
_PLACES = ("under the blue flower pot", "behind the mirror", "in the red tin", "inside the piano", "below the bench")
_GENERAL = (
    ("How many days does a leap year have?", "366"),
    ("What is the chemical symbol of gold?", "Au"),
    ("Which planet is the largest one of the solar system?", "Jupiter"),
    ("How many sides does a hexagon have?", "6"),
    ("What is the capital of Italy?", "Rome"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("At how many degrees Celsius does water boil at sea level?", "100"),
    ("Which ocean lies between Europe and America?", "Atlantic"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """`expected` is in a right answer; `reference` is one. `note` stays on the device."""

    kind: Kind
    note: str
    question: str
    expected: str
    reference: str


def cases(notes: int, seed: int) -> list[Case]:
    """Three for each note, one of each kind."""
    made: list[Case] = []
    for number in range(notes):
        draw = random.Random(f"{seed} {number}")
        guest, friend = draw.sample(_NAMES, 2)
        (land, capital), dish, place = draw.choice(_LANDS), draw.choice(_DISHES), draw.choice(_PLACES)
        code = f"{draw.randrange(1000, 9999)}"
        note = (
            f"My guest on Friday is {guest}, who comes from {land}. {friend} likes {dish} best. "
            f"The code of the garden gate is {code}. The spare key lies {place}."
        )
        private = draw.choice(
            (
                ("What is the code of the garden gate?", code, f"The code of the garden gate is {code}."),
                (f"What does {friend} like to eat best?", dish, f"{friend} likes {dish} best."),
                ("Where does the spare key lie?", place, f"The spare key lies {place}."),
            )
        )
        question, told = _GENERAL[(seed + number) % len(_GENERAL)]
        made += [
            Case("private", note, *private),
            Case("general", note, question, told, f"{told}."),
            Case(
                "both",
                note,
                "Which city is the capital of the country that my guest on Friday comes from?",
                capital,
                f"The capital of {land} is {capital}.",
            ),
        ]
    return made


def informed(case: Case) -> list[Message]:
    """What the device reads."""
    told = f"These are notes of the user:\n{case.note}\nAnswer the user's question in one short sentence."
    return [Message("system", told), Message("user", case.question)]


def public(case: Case) -> list[Message]:
    """What the cloud reads: nothing of the note."""
    return [Message("system", "Answer the user's question in one short sentence."), Message("user", case.question)]
