"""Text as it streams: independent of how it is cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.text import TextStream


def stream(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What each piece settles, the rest last, and whether a stop string ended it."""
    text = TextStream(stop)
    shown = [text.push(piece) for piece in pieces]
    return [*shown, text.push(b"", final=True)], text.stopped


def cut(raw: bytes, at: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(min(edge, len(raw)) for edge in at), len(raw)]
    return [raw[a:b] for a, b in pairwise(edges)]


class TestCharacters:
    def test_only_whole_ones_are_shown(self) -> None:
        pieces = [bytes([byte]) for byte in "é😀x".encode()]
        assert stream(pieces)[0] == ["", "é", "", "", "", "😀", "x", ""]

    def test_half_a_one_at_the_end_is_replaced(self) -> None:
        assert stream([b"a", "😀".encode()[:2]])[0] == ["a", "", "�"]

    def test_broken_bytes_do_not_end_the_text(self) -> None:
        assert "".join(stream([b"a\xff", b"b\xc3", b"(c"])[0]) == "a�b�(c"

    @given(st.text(max_size=40), st.lists(st.integers(0, 100), max_size=20))
    def test_any_cut_gives_the_text(self, text: str, at: list[int]) -> None:
        shown, stopped = stream(cut(text.encode(), at))
        assert "".join(shown) == text
        assert not stopped
        assert all("�" not in part for part in shown) or "�" in text


class TestStop:
    def test_ends_the_text_before_it(self) -> None:
        assert stream([b"one two", b" three"], ["two"]) == (["one ", "", ""], True)

    def test_across_tokens(self) -> None:
        shown, stopped = stream([b"one\n", b"\nUs", b"er", b": more"], ["\n\nUser:"])
        assert (shown, stopped) == (["one", "", "", "", ""], True)

    def test_what_only_began_like_it_is_shown_after_all(self) -> None:
        assert stream([b"a EN", b"D", b"IVE"], ["ENDED"])[0] == ["a ", "", "ENDIV", "E"]

    def test_a_beginning_at_the_end_is_shown(self) -> None:
        assert stream([b"the en"], ["end"]) == (["the ", "en"], False)

    def test_that_overlaps_itself(self) -> None:
        assert stream([b"a", b"a", b"b"], ["aab"]) == (["", "", "", ""], True)
        assert stream([b"a", b"a", b"a", b"b"], ["aab"])[0] == ["", "", "a", "", ""]

    def test_within_a_character_of_several_bytes(self) -> None:
        raw = "so 😀!".encode()
        assert stream([raw[:5], raw[5:]], ["😀"]) == (["so ", "", ""], True)

    def test_the_first_to_be_complete_wins(self) -> None:
        for pieces in ([b"abc"], [b"a", b"bc"], [b"a", b"b", b"c"]):
            shown, stopped = stream(pieces, ["abc", "b"])
            assert ("".join(shown), stopped) == ("a", True)

    def test_nothing_is_shown_after_it(self) -> None:
        text = TextStream(["x"])
        assert text.push(b"ax") == "a"
        assert text.push(b"more") == ""
        assert text.push(b"more", final=True) == ""

    @pytest.mark.parametrize("stop", [[], [""], ["", ""]])
    def test_an_empty_one_is_none(self, stop: list[str]) -> None:
        assert stream([b"ab", b"c"], stop) == (["ab", "c", ""], False)

    @given(
        text=st.text("ab\né😀", max_size=30),
        stop=st.lists(st.text("ab\né😀", min_size=1, max_size=5), max_size=4),
        at=st.lists(st.integers(0, 100), max_size=30),
    )
    def test_any_cut_gives_the_same(self, text: str, stop: list[str], at: list[int]) -> None:
        shown, stopped = stream(cut(text.encode(), at), stop)
        ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
        assert stopped == bool(ends)
        assert "".join(shown) == (text[: min(ends)[1]] if ends else text)

    @given(text=st.text("abc", max_size=30), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
    def test_holds_back_no_more_than_it_must(self, text: str, stop: list[str]) -> None:
        shown = TextStream(stop)
        out = "".join(shown.push(char.encode()) for char in text)
        if not shown.stopped:
            held = text[len(out) :]
            assert text.startswith(out)
            assert not held or any(word.startswith(held) for word in stop)
