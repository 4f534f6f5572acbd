"""What the detector finds, what it leaves alone, and what it calls unsettled."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.privacy import Detector, Kind
from agent.privacy.span import Span, united
from protocol.errors import ConfigError


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(["GB", "US"])


DETECTOR = Detector(["GB", "US"])


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("mail anna.keller+x@mail.example.co.uk.", "anna.keller+x@mail.example.co.uk", Kind.EMAIL),
        ('{"mail":"a@b.de"}', "a@b.de", Kind.EMAIL),
        ("call 020 7946 0958 today", "020 7946 0958", Kind.PHONE),
        ("at +49 30 9018 2046, please", "+49 30 9018 2046", Kind.PHONE),
        ("my phone is 2025550143 now", "2025550143", Kind.PHONE),
        ("card 4111-1111-1111-1111 12/27", "4111-1111-1111-1111", Kind.CARD),
        ("IBAN DE89 3704 0044 0532 0130 00 please", "DE89 3704 0044 0532 0130 00", Kind.IBAN),
        ("SSN 123-45-6789", "123-45-6789", Kind.ID),
        ("NI number AB 12 34 56 C", "AB 12 34 56 C", Kind.ID),
        ("my passport number is X1234567", "X1234567", Kind.ID),
        ("host 192.168.1.20 is down", "192.168.1.20", Kind.IP),
        ("fe80::1ff:fe23:4567:890a is", "fe80::1ff:fe23:4567:890a", Kind.IP),
        ("MAC 3c:22:fb:aa:bb:cc", "3c:22:fb:aa:bb:cc", Kind.MAC),
        ("see https://bob:pw1@x.org/a now", "https://bob:pw1@x.org/a", Kind.URL),
        ("my password is hunter2, ok", "hunter2", Kind.SECRET),
        ("API_KEY='correct horse'", "correct horse", Kind.SECRET),
        ("use ghp_abcdefghijklmnopqrstuvwxyz0123456789", "ghp_abcdefghijklmnopqrstuvwxyz0123456789", Kind.SECRET),
        ("I was born on 12 March 1984.", "12 March 1984", Kind.BIRTH),
        ("My name is Zorblax Quux and", "Zorblax Quux", Kind.NAME),
        ("my name is anna keller and", "anna keller", Kind.NAME),
        ("Mrs O'Brien-Smith rang", "O'Brien-Smith", Kind.NAME),
        ("Best regards,\nTjorven Ek", "Tjorven Ek", Kind.NAME),
        ("Yesterday Laura Quartermaine paid", "Laura Quartermaine", Kind.NAME),
        ("at 12 High Street, London SW1A 1AA.", "12 High Street, London SW1A 1AA", Kind.ADDRESS),
        ("Hauptstraße 12, 10115 Berlin", "Hauptstraße 12, 10115 Berlin", Kind.ADDRESS),
        ("12 rue de la Paix, 75002 Paris", "12 rue de la Paix, 75002 Paris", Kind.ADDRESS),
    ],
)
def test_each_kind_is_found_whole(detector: Detector, text: str, value: str, kind: Kind) -> None:
    found = [(text[span.start : span.end], span.kind) for span in detector.spans(text)]
    assert (value, kind) in found


@pytest.mark.parametrize(
    "text",
    [
        "It costs $1,299.99, or 3.141592653 times more.",
        "Version 1.2.3.4 of 2024-05-12 10:30:45",
        "ISBN 978-3-16-148410-0, order 4829104820",
        "The password is required. password = getpass.getpass()",
        "std::vector<int> a::b; x = foo[12]",
        "Hello World! Dear customer, in 1998 there were 500000 people in New York City.",
        "The Apple Watch Series 7 beats Model X.",
    ],
)
def test_what_only_looks_like_it_is_left_alone(detector: Detector, text: str) -> None:
    assert detector.spans(text) == []


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("My name is ", ""),
        ("My name is Jo", "Jo"),
        ("Dear Anna", "Anna"),
        ("call 020 79", "020 79"),
        ("password: hu", "hu"),
        ("mail anna@ex", "anna@ex"),
        ("see https://us", "https://us"),
    ],
)
def test_what_is_half_written_is_unsettled(detector: Detector, text: str, begins: str) -> None:
    at = detector.unsettled(text)
    assert at is not None
    assert text[at:] == begins


def test_a_year_is_settled_unless_every_digit_counts(detector: Detector) -> None:
    assert detector.unsettled("in 1998") is None
    assert detector.unsettled("in 1998", few=1) == 3
    assert detector.unsettled("in 1998 there", few=1) is None


def test_a_region_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.regions: 'XX' is no country"):
        Detector(["XX"])


@given(st.text(max_size=200))
def test_any_text_has_spans_in_order_and_apart(text: str) -> None:
    spans = DETECTOR.spans(text)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert all(one.end <= other.start for one, other in pairwise(spans))
    at = DETECTOR.unsettled(text)
    assert at is None or 0 <= at <= len(text)


def test_what_overlaps_is_hidden_as_one() -> None:
    spans = united([Span(0, 5, Kind.PHONE, 0.5), Span(3, 9, Kind.CARD, 0.9), Span(9, 10, Kind.ID, 0.9)])
    assert spans == [Span(0, 9, Kind.CARD, 0.9), Span(9, 10, Kind.ID, 0.9)]
