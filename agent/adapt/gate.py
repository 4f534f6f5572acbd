"""The gate: what an adapter has to show before it is used, with the engine that serves.

1. It writes: finite numbers, no end at once, no endless repetition, where the bare model has none either.
2. Plain text stays as likely: its perplexity is at most `WORSE` times the bare model's.
3. Lessons that it was not trained on, a fifth of all: it is better by more than chance than the better of the bare
   model and what is in use now. An adapter from elsewhere need only be no worse by more than chance, as this device may
   have no lessons of what it is good at.

Chance is a paired sign-flip test on the lessons' losses (Fisher, 1935): how often the mean difference is as large if
each lesson's sign is thrown.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.adapt.job import Scores, Verdict
from agent.adapt.lesson import Lesson, Target
from agent.adapt.plain_text import PASSAGES, QUESTIONS
from agent.adapt.router import prompt_of
from models.chat import encode_chat
from models.engine.base import Engine, Floats, Mix
from models.engine.open import EngineOptions, open_engine
from protocol.errors import RequestError
from protocol.resolve import Message

LEAST, MOST = 8, 64  # held-out lessons: fewer prove nothing, more only take time
WORSE = 1.1  # perplexity of plain text against the bare model's
CHANCE = 0.05

_LONGEST = 2048  # tokens of a lesson that is judged
_WRITTEN = 32  # tokens of a smoke prompt's answer
_PERIOD, _TIMES = 4, 6  # an answer that ends with up to so many tokens, so often in a row, would never end
_FLIPS = 9_999
_PLACES = max(len(PASSAGES), len(QUESTIONS))

Tell = Callable[[int, int], None]  # done, total


def held_out(lesson: Lesson) -> bool:
    """Never trained on: a fifth of all, by what was read before the answer, so that a question is always on the same
    side."""
    read = array("q", prompt_of(lesson)).tobytes()
    return int.from_bytes(hashlib.blake2b(read, digest_size=8).digest()) % 5 == 0


def judge(
    model: Path, candidate: Path, present: Path | None, lessons: Iterable[Lesson], threads: int, tell: Tell, own: bool
) -> Verdict:
    """`present`: in use now. `lessons`: all, newest first; the held-out ones are taken. `own`: trained here, so it has
    to be better at what it learned. Raises BadAdapter, BadModelFile."""
    context = max(_LONGEST, _PLACES * 256)
    engine = open_engine(model, EngineOptions(context=context, sequences=_PLACES, threads=threads, hidden=False))
    try:
        return Gate(engine, candidate, present, tell).judge(lessons, own)
    finally:
        engine.close()


class Gate:
    """The engine has at least `_PLACES` sequences, all free. Raises BadAdapter."""

    def __init__(self, engine: Engine, candidate: Path, present: Path | None, tell: Tell) -> None:
        self._engine = engine
        self._mixes: dict[str, Mix] = {"bare": ()}
        if present is not None:
            self._mixes["present"] = ((engine.attach(present), 1.0),)
        self._mixes["candidate"] = ((engine.attach(candidate), 1.0),)
        self._tell = tell

    def judge(self, lessons: Iterable[Lesson], own: bool) -> Verdict:
        held = self._judged(lessons)
        total = len(self._mixes) * (2 + len(held))
        done = 0

        def progress() -> None:
            nonlocal done
            done += 1
            self._tell(done, total)

        spoken, plain = {}, {}
        for name, mix in self._mixes.items():
            spoken[name] = self._speaks(mix)
            progress()
            plain[name] = self._perplexity(mix)
            progress()
        if not math.isfinite(plain["candidate"]):
            return Verdict(False, "it does not give finite numbers", 0)
        read: dict[str, list[tuple[float, float]]] = {name: [] for name in self._mixes}
        for lesson in held:
            for name, mix in self._mixes.items():
                read[name].append(self._read(mix, lesson))
                progress()
        table = {name: np.array(rows, np.float64).reshape(-1, 2) for name, rows in read.items()}
        if not np.isfinite(table["candidate"]).all():
            return Verdict(False, "it does not give finite numbers", len(held))
        scores = {name: _scores(table[name], plain[name]) for name in self._mixes}
        before = min((name for name in table if name != "candidate"), key=lambda name: _mean(table[name][:, 0]))
        gain = table[before] - table["candidate"]  # of loss, and what top-1 loses
        chance = by_chance(gain[:, 0]) if len(held) else None
        reason = (
            _silent(spoken)
            or _forgets(plain)
            or (_no_better(gain, chance) if own else _worse(gain) if len(held) >= LEAST else "")
        )
        return Verdict(
            passed=not reason,
            reason=reason or ("better at what it learned" if own else "no worse here"),
            judged=len(held),
            bare=scores["bare"],
            present=scores.get("present"),
            candidate=scores["candidate"],
            chance=chance,
        )

    def _judged(self, lessons: Iterable[Lesson]) -> list[Lesson]:
        vocab, longest = self._engine.info.vocab, min(_LONGEST, self._engine.context)

        def fits(lesson: Lesson) -> bool:
            ids = [id for target in lesson.targets for id in target.ids]
            return len(lesson.tokens) <= longest and max(*lesson.tokens, *ids) < vocab

        teaching = (one for one in lessons if held_out(one) and any(_teaches(target) for target in one.targets))
        return [lesson for lesson in teaching if fits(lesson)][:MOST]

    def _read(self, mix: Mix, lesson: Lesson) -> tuple[float, float]:
        """Mean loss and share of likeliest tokens that are right, over what the lesson teaches."""
        place = self._engine.open(lesson.tokens, 0, mix)
        losses, right = [], []
        for target in filter(_teaches, lesson.targets):
            (step,) = self._engine.forward([(place, place.align(lesson.tokens[: target.position]))])
            losses.append(_loss(step.logits, target))
            right.append(float(step.logits.argmax() == _wanted(target)))
        place.close()
        return sum(losses) / len(losses), sum(right) / len(right)

    def _perplexity(self, mix: Mix) -> float:
        """Of all passages, read side by side; infinite if a number is not finite."""
        texts = [self._engine.tokenizer.encode(text, start=True)[:256] for text in PASSAGES]
        places = [self._engine.open(tokens, 0, mix) for tokens in texts]
        for place in places:
            place.rewind(0)
        losses: list[float] = []
        for at in range(max(map(len, texts)) - 1):
            feeds = [(place, tokens) for place, tokens in zip(places, texts, strict=True) if at + 1 < len(tokens)]
            steps = self._engine.forward([(place, [tokens[at]]) for place, tokens in feeds])
            losses += [_surprise(step.logits, tokens[at + 1]) for step, (_, tokens) in zip(steps, feeds, strict=True)]
        for place in places:
            place.close()
        mean = sum(losses) / len(losses)
        return math.exp(mean) if mean < 700.0 else math.inf

    def _speaks(self, mix: Mix) -> list[bool]:
        """Of each question: does its answer begin, and not go round in circles?"""
        prompts = [self._prompt(question) for question in QUESTIONS]
        places = [self._engine.open(prompt, _WRITTEN, mix) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        feeds = {n: place.align(prompt) for n, (place, prompt) in enumerate(zip(places, prompts, strict=True))}
        for _ in range(_WRITTEN):
            steps = self._engine.forward([(places[n], feed) for n, feed in feeds.items()])
            likeliest = {n: int(step.logits.argmax()) for n, step in zip(feeds, steps, strict=True)}
            feeds = {n: [token] for n, token in likeliest.items() if token not in self._engine.tokenizer.eog}
            for n, (token,) in feeds.items():
                answers[n].append(token)
            if not feeds:
                break
        for place in places:
            place.close()
        return [bool(answer) and not circles(answer) for answer in answers]

    def _prompt(self, question: str) -> list[int]:
        tokenizer = self._engine.tokenizer
        with suppress(RequestError):  # a model without a chat template
            return encode_chat(tokenizer, [Message("user", question)])
        return tokenizer.encode(question, start=True)


def circles(tokens: Sequence[int]) -> bool:
    """Whether it ends with the same few tokens again and again."""
    return any(
        len(tokens) >= period * _TIMES and list(tokens[-period * _TIMES :]) == list(tokens[-period:]) * _TIMES
        for period in range(1, _PERIOD + 1)
    )


def by_chance(gain: NDArray[np.float64]) -> float:
    """How often the mean of `gain` (n,) is as large if each one's sign is thrown."""
    signs = np.random.default_rng(1).choice((-1.0, 1.0), (_FLIPS, len(gain)))
    thrown = (signs * gain).mean(axis=1)
    return float((1 + (thrown >= gain.mean() - 1e-12).sum()) / (1 + _FLIPS))


def _teaches(target: Target) -> bool:
    return target.kind != "kept"


def _wanted(target: Target) -> int:
    return target.ids[max(range(len(target.p)), key=target.p.__getitem__)] if target.p else target.ids[0]


def _surprise(logits: Floats, token: int) -> float:
    """-log p, nats."""
    return _log_sum(logits) - float(logits[token])


def _loss(logits: Floats, target: Target) -> float:
    """Cross-entropy: of a label's token, or of the LLM's distribution with its tail as one outcome."""
    if target.kind == "label":
        return _surprise(logits, target.ids[0])
    whole = _log_sum(logits)
    told = logits[target.ids].astype(np.float64) - whole
    tail = max(0.0, 1.0 - math.fsum(target.p))
    rest = max(1e-9, 1.0 - float(np.exp(told).sum()))
    return -math.fsum(p * float(q) for p, q in zip(target.p, told, strict=True)) - tail * math.log(rest)


def _log_sum(logits: Floats) -> float:
    top = float(logits.max())
    return top + math.log(float(np.exp(logits - top, dtype=np.float64).sum()))


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _scores(rows: NDArray[np.float64], perplexity: float) -> Scores:
    if not len(rows):
        return Scores(None, None, perplexity)
    return Scores(_mean(rows[:, 0]), _mean(rows[:, 1]), perplexity)


def _silent(spoken: dict[str, list[bool]]) -> str:
    pairs = zip(spoken["bare"], spoken["candidate"], strict=True)
    bad = sum(1 for bare, candidate in pairs if bare and not candidate)
    return f"{bad} of {len(QUESTIONS)} ordinary questions get no answer, or one that repeats for ever" if bad else ""


def _forgets(plain: dict[str, float]) -> str:
    if plain["candidate"] <= WORSE * plain["bare"]:
        return ""
    return (
        f"plain text became less likely: perplexity {plain['candidate']:.1f} instead of {plain['bare']:.1f}, "
        f"at most {WORSE:g} times that is allowed"
    )


def _no_better(gain: NDArray[np.float64], chance: float | None) -> str:
    if chance is None or len(gain) < LEAST:
        return f"not enough to judge: {len(gain)} held-out lessons, {LEAST} are needed"
    if chance > CHANCE:
        return f"not better at what it learned by more than chance (p = {chance:.2f})"
    if by_chance(gain[:, 1]) < CHANCE:
        return "its likeliest token is right less often"
    return ""


def _worse(gain: NDArray[np.float64]) -> str:
    return "worse at what this device has lessons of" if by_chance(-gain[:, 0]) < CHANCE else ""
