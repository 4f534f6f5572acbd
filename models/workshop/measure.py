"""What a model costs and how well it foretells a text, measured in a process that nothing else is in."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from models.engine.base import Tokenizer
from models.engine.open import Kind, open_tokenizer
from models.workshop.child import Say, here, run
from models.workshop.inspect import inspect
from models.workshop.job import Job
from models.workshop.measure_model import ASKED, LIKELIEST, LOSSES, MEASURED, Asked, Found
from models.workshop.perplexity import Reading, beginnings, exp_mean
from models.workshop.speed import ROUNDS
from protocol.errors import BadModelFile, ConfigError, WorkshopError


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that was looked into and can run. `bytes` of all its files; `context` in tokens, None if it does not
    say."""

    path: Path
    engine: Kind
    quantisation: str
    bytes: int
    context: int | None
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Measured:
    """`perplexity` of the `tokens` that were foretold, with its 95 % interval; `bits_per_byte` of their text compares
    across tokenizers; `vocabulary`: the tokenizer's fingerprint; `rss_mb`: peak of the process."""

    path: str
    engine: Kind
    quantisation: str
    bytes: int
    vocabulary: str
    tokens: int
    perplexity: float
    perplexity_95: tuple[float, float]
    bits_per_byte: float
    decode_tok_s: float
    prefill_tok_s: float
    first_token_ms: float
    rss_mb: float


def measure(
    path: Path,
    passages: Sequence[str],
    *,
    tokens: int,
    threads: int,
    env: Mapping[str, str],
    say: Say,
    rounds: int = ROUNDS,
) -> Measured:
    """With up to `tokens` tokens of each passage; `threads` 0: every physical core; `rounds` of the speed, whose
    medians count. Raises BadModelFile, UnsafePath, ConfigError, WorkshopError."""
    subject = look_into(path)
    read = tokens_of(passages, subject, tokens)
    asked = Asked(here(path), read, threads, rounds, keep=False)
    with tempfile.TemporaryDirectory() as folder:
        measured, _ = measure_in(Path(folder), subject, asked, Job(env, say))
    return measured


def look_into(path: Path) -> Subject:
    """Raises BadModelFile, UnsafePath."""
    report = inspect(path)
    if not report.runs:
        raise BadModelFile(f"{path}: Skerry cannot run it: {report.missing[0]}")
    return Subject(path, report.format, report.quantisation, report.size, report.context, open_tokenizer(path))


def tokens_of(passages: Sequence[str], subject: Subject, tokens: int) -> list[list[int]]:
    """As the model reads them, and no longer than its context. Raises ConfigError if that is next to nothing."""
    found = beginnings(passages, subject.tokenizer, min(tokens, subject.context or tokens))
    if sum(len(passage) - 1 for passage in found) < 2:
        raise ConfigError("there is too little text to measure with: give more of it, or more --tokens or --passages")
    return found


def measure_in(folder: Path, subject: Subject, asked: Asked, job: Job) -> tuple[Measured, Reading]:
    """Works in the folder, which is empty. Raises WorkshopError."""
    (folder / ASKED).write_bytes(msgspec.json.encode(asked))
    run(f"measuring {subject.path}", "models.workshop.measure_model", [here(folder)], env=job.env, say=job.say)
    found = msgspec.json.decode((folder / MEASURED).read_bytes(), type=Found)
    reading = Reading(np.load(folder / LOSSES), np.load(folder / LIKELIEST))
    if not np.isfinite(reading.losses).all():
        raise WorkshopError(f"{subject.path}: gives numbers that are not finite: it is damaged, or was made wrongly")
    perplexity = exp_mean(reading.losses)
    text = sum(len(subject.tokenizer.piece(token)) for tokens in asked.passages for token in tokens[1:])
    measured = Measured(
        path=str(subject.path),
        engine=subject.engine,
        quantisation=subject.quantisation,
        bytes=subject.bytes,
        vocabulary=subject.tokenizer.fingerprint,
        tokens=len(reading.losses),
        perplexity=perplexity.value,
        perplexity_95=(perplexity.low, perplexity.high),
        bits_per_byte=float(reading.losses.sum()) / math.log(2) / max(1, text),
        decode_tok_s=found.speed.decode_tok_s,
        prefill_tok_s=found.speed.prefill_tok_s,
        first_token_ms=found.speed.first_token_ms,
        rss_mb=found.peak / 1e6,
    )
    return measured, reading
