"""Two models on the same text: what the second one saves and what that costs.

Both are measured one after the other, each in a process of its own. Models of one vocabulary read the same tokens, so
their distributions can be compared token by token; of others only what they need per byte of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.workshop.child import here
from models.workshop.job import Job, making
from models.workshop.measure import Measured, look_into, measure_in, tokens_of
from models.workshop.measure_model import DISTRIBUTIONS, Asked
from models.workshop.perplexity import (
    Estimate,
    Halves,
    Reading,
    common_beginnings,
    distributions_at,
    divergences,
    exp_mean,
    mean,
)

_FLOAT16 = 2  # bytes


@dataclass(frozen=True, slots=True)
class Close:
    """How alike two models of one vocabulary are, over all tokens. `agreement`: share where both find the same token
    likeliest; `kl`: mean KL(first || second) in nats; `perplexity_ratio`: second over first, pair by pair."""

    agreement: Estimate
    kl: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True, slots=True)
class Comparison:
    """`close` is None if the models have different tokenizers, as it is not defined then."""

    first: Measured
    second: Measured
    close: Close | None


def compare(
    first: Path, second: Path, texts: Sequence[str], cache: Path, *, tokens: int, threads: int, rounds: int, job: Job
) -> Comparison:
    """With up to `tokens` tokens of each text; `threads` 0: every physical core; `rounds` of the speed, whose medians
    count. Distributions are kept in the folder `cache` meanwhile.

    Raises BadModelFile, UnsafePath, ConfigError, DiskFull, WorkshopError.
    """
    one, two = look_into(first), look_into(second)
    same = one.tokenizer.fingerprint == two.tokenizer.fingerprint
    longest = min(filter(None, (tokens, one.context, two.context)))
    if not same:
        texts = common_beginnings(texts, (one.tokenizer, two.tokenizer), longest)
    read = tokens_of(texts, one, longest)
    passages = read, read if same else tokens_of(texts, two, longest)
    kept = sum(len(passage) - 1 for passage in read) * one.tokenizer.vocab * _FLOAT16 if same else 0
    with making(cache / "compare", 2 * kept, job) as work:
        folders = work / "1", work / "2"
        done = []
        for subject, own, folder in zip((one, two), passages, folders, strict=True):
            folder.mkdir()
            done.append(measure_in(folder, subject, Asked(here(subject.path), own, threads, rounds, same), job))
        (measured, first_read), (measured_too, second_read) = done
        said = [distributions_at(folder / DISTRIBUTIONS, one.tokenizer.vocab) for folder in folders if same]
        close = _close(first_read, second_read, *said) if same else None
    return Comparison(measured, measured_too, close)


def _close(one: Reading, two: Reading, said: Halves, said_too: Halves) -> Close:
    return Close(
        agreement=mean((one.likeliest == two.likeliest).astype(np.float64), 0.0, 1.0),
        kl=mean(divergences(said, said_too), 0.0),
        perplexity_ratio=exp_mean(two.losses - one.losses),
    )
