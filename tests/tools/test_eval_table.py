"""Labelled texts out of the user's own CSV file."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigError
from tools.eval.table import MOST_LABELS, Dataset, read


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "own.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(data: Dataset) -> list[tuple[str, str]]:
    return [(data.labels[item.label], item.text) for item in data.items]


def test_rows_come_with_their_labels_whatever_the_order_of_the_columns(tmp_path: Path) -> None:
    data = read(write(tmp_path, "id,Text,label\n1,the match,sport\n2,the vote,politics\n"))
    assert data.labels == ("politics", "sport")
    assert pairs(data) == [("sport", "the match"), ("politics", "the vote")]


@pytest.mark.parametrize(
    "content",
    [
        "label,text\nsport,the match\npolitics,the vote\n",
        "label,text\r\nsport,the match\r\npolitics,the vote",
        "\ufefflabel,text\nsport,the match\npolitics,the vote\n",
        "\n\nlabel,text\n\nsport,the match\n   \n,\npolitics,the vote\n\n\n",
        '"label","text"\n"sport"," the  match "\n"politics","the\nvote"\n',
    ],
    ids=["plain", "CRLF", "BOM", "blank lines", "quotes and space"],
)
def test_what_editors_do_to_a_file_changes_nothing(tmp_path: Path, content: str) -> None:
    assert pairs(read(write(tmp_path, content))) == [("sport", "the match"), ("politics", "the vote")]


def test_labels_may_be_any_words_and_texts_may_hold_quotes_and_commas(tmp_path: Path) -> None:
    content = (
        'label,text\ncaf\u00e9 chains,"He said ""no"", twice"\ncafe\u0301 chains,b\n\u8db3\u7403,c\n"art, new",d\n'
    )
    data = read(write(tmp_path, content))
    assert data.labels == ("art, new", "caf\u00e9 chains", "\u8db3\u7403")
    assert data.items[0].text == 'He said "no", twice'
    assert [item.label for item in data.items] == [1, 1, 2, 0]


def test_texts_that_look_the_same_to_a_model_come_once(tmp_path: Path) -> None:
    long = "word " * 100
    rows = ["a,same", "b,same", "a, same ", f"a,{long}one", f"b,{long}two", "b,other"]
    data = read(write(tmp_path, "label,text\n" + "\n".join(rows)))
    assert [(label, text[:5]) for label, text in pairs(data)] == [("a", "same"), ("a", "word "), ("b", "other")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "empty; the first line names"),
        ("\n\n", "empty; the first line names"),
        ("label;text\na;b\n", "line 1: no column 'label'"),
        ("\ncategory,text\na,b\n", "line 2: no column 'label'"),
        ("label,body\na,b\n", "line 1: no column 'text'"),
        ("label,text,text\na,b,c\n", "line 1: more than one column 'text'"),
        ("label,text\n", "no rows"),
        ("label,text\na,b\na,c\n", "one label, and at least two"),
        ('label,text\na,"b\n\nc"\n\nb,\n', "line 6: the text is empty"),
        ("label,text\na,b\n ,c\n", "line 3: the label is empty"),
        ("label,text\na,b\nb,c, and d\n", "line 3: 3 fields, but the header has 2; put texts into double quotes"),
        ("label,text\na,b\nb\n", "line 3: 1 fields"),
        ('label,text\na,b\nb,"c\nd,e\n', "line 3: no CSV from here on"),
        (b"label,text\na,b\nb,caf\xe9\n", "line 3: not UTF-8"),
        (
            "label,text\n" + "".join(f"l{i},t{i}\n" for i in range(MOST_LABELS + 1)),
            f"{MOST_LABELS + 1} different labels",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as told:
        read(path)
    assert str(told.value).startswith(str(path))
    assert complaint in str(told.value)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none.csv")


def test_thousands_of_rows_are_drawn_from_by_the_seed(tmp_path: Path) -> None:
    rows = "".join(f"{'odd' if i % 2 else 'even'},text number {i}\n" for i in range(5000)) + "rare,seen once\n"
    data = read(write(tmp_path, "label,text\n" + rows))
    assert len(data.items) == 5001
    assert data.labels == ("even", "odd", "rare")
    assert data.drawn(100, 1) == data.drawn(100, 1) != data.drawn(100, 2)
    assert len(data.drawn(100, 1).items) == 100
    assert set(data.drawn(9999, 3).items) == set(data.items)


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=40)), max_size=8))
def test_any_table_that_a_program_writes_is_read_or_refused_in_words(rows: list[tuple[str, str]]) -> None:
    rows = [(label.replace("\0", ""), text.replace("\0", "")) for label, text in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.csv"
        with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file).writerows([("label", "text"), *rows])
        try:
            data = read(path)
        except ConfigError:
            return
    assert len(data.labels) >= 2
    assert all(item.text and 0 <= item.label < len(data.labels) for item in data.items)
