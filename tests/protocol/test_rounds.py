"""The messages of a round."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import rounds
from protocol.errors import ProtocolError
from protocol.rounds import Agreed, Call, Group, Learned, Level, Overall, Report, Told, Update, Whole, encode, nearest
from protocol.topics import UPDATE

SHARE = st.floats(0.0, 1.0)
NUMBER = st.integers(0, rounds.MAX_NUMBER)
SUBJECT = st.text("0123456789abcdef", min_size=16, max_size=16)
STATISTICS = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3)
EVIDENCE = st.floats(0.0, 1e12)
LEVEL = st.builds(Level, SHARE, EVIDENCE, NUMBER)
GROUP = st.builds(Group, threshold=SHARE, evidence=EVIDENCE, devices=NUMBER, centre=STATISTICS)
WHOLE = st.builds(Whole, LEVEL, st.lists(GROUP, max_size=3), st.none() | STATISTICS)
LEARNED = st.builds(Learned, st.none() | LEVEL, st.none() | WHOLE)
TOLD = st.builds(Told, LEVEL, NUMBER, st.lists(LEVEL, max_size=3), st.lists(STATISTICS, max_size=3))

MESSAGES = {
    rounds.decode_call: st.builds(Call, NUMBER, st.floats(0.1, 86_400), st.floats(0, 86_400), st.booleans()),
    rounds.decode_update: st.builds(
        Update, NUMBER, NUMBER, SUBJECT, st.floats(-2, 2), EVIDENCE, st.none() | STATISTICS, SHARE, SHARE
    ),
    rounds.decode_agreed: st.builds(Agreed, NUMBER, NUMBER, st.dictionaries(SUBJECT, LEARNED, max_size=3)),
    rounds.decode_report: st.builds(Report, NUMBER, st.dictionaries(SUBJECT, TOLD, max_size=3)),
    rounds.decode_overall: st.builds(Overall, NUMBER, st.dictionaries(SUBJECT, WHOLE, max_size=3)),
}
Decode = Callable[[bytes], object]


@given(st.data(), st.sampled_from(list(MESSAGES)))
def test_what_is_encoded_is_read_back(data: st.DataObject, decode: Decode) -> None:
    message = data.draw(MESSAGES[decode])
    assert decode(encode(message)) == message


@given(st.sampled_from(list(MESSAGES)), st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_whatever_comes_is_an_error_or_nothing(decode: Decode, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(payload)


@pytest.mark.parametrize("decode", MESSAGES)
def test_a_newer_version_is_told_from_what_is_malformed(decode: Decode) -> None:
    assert decode(b'{"version": 2, "something": "else"}') is None
    with pytest.raises(ProtocolError, match="malformed"):
        decode(b'{"version": 1}')


def test_a_field_that_is_not_known_is_ignored() -> None:
    update = Update(1, 0, "0" * 16, 0.5, 10.0)
    assert rounds.decode_update(json.dumps({**json.loads(encode(update)), "later": [1]}).encode()) == update


@pytest.mark.parametrize("threshold", ["NaN", "Infinity", "-Infinity", "1e999", '"0.5"', "null"])
def test_a_threshold_that_is_no_number_is_malformed(threshold: str) -> None:
    payload = f'{{"version":1,"round":1,"base":0,"subject":"{"0" * 16}","threshold":{threshold},"evidence":1}}'
    with pytest.raises(ProtocolError):
        rounds.decode_update(payload.encode())


def test_what_is_too_large_is_not_read() -> None:
    padded = encode(Update(1, 0, "0" * 16, 0.5, 10.0)) + b" " * UPDATE.limit
    with pytest.raises(ProtocolError, match="over the limit"):
        rounds.decode_update(padded)


def test_an_update_is_small() -> None:
    update = Update(1 << 40, 1 << 40, "0" * 16, 1 / 3, 1e5 / 3, [1 / 3, 2 / 3, -1 / 7])
    assert len(encode(update)) < 300, "a device on a bad link pays for it in each round"


def test_subjects_differ_by_measure_model_and_goal() -> None:
    subjects = {rounds.subject(*what) for what in (("u", "m", "g"), ("v", "m", "g"), ("u", "n", "g"), ("u", "m", "h"))}
    assert len(subjects) == 4
    assert rounds.subject("u", "m", "g") in subjects
    assert rounds.subject("um", "", "g") != rounds.subject("u", "m", "g"), "the parts are kept apart"
    assert msgspec.convert(rounds.subject("u", "m", "g"), rounds.Subject)


def test_a_device_belongs_to_the_group_that_is_nearest_in_units_of_the_scale() -> None:
    groups = [Group(0.1, 1.0, 1, [0.0, 0.0, 0.0]), Group(0.9, 1.0, 1, [1.0, 0.0, 10.0])]
    whole = Whole(Level(0.5, 2.0, 2), groups, [1.0, 1.0, 100.0])
    assert nearest([0.9, 0.0, 0.0], whole) == 1, "the third number counts little"
    assert nearest([0.9, 0.0, 0.0], msgspec.structs.replace(whole, scale=[1.0, 1.0, 0.1])) == 0
    assert nearest([0.9, 0.0, 0.0], msgspec.structs.replace(whole, groups=[])) is None
