"""`skerry eval fusion`: what the weight of mode fuse is worth where the device knows what the cloud may not.

A generated note of private facts is in the device's prompt alone; the cloud is told the question and what has been
written so far. Questions need the note, general knowledge, or both. The cloud's part is its likeliest tokens with the
tail's mass, as the product sends them, and what is made of them is the product's own code (agent/combine.py).
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from agent.combine import Weight, combine, complete
from agent.resolver import Reply
from agent.uncertainty import Softmax
from models.chat import encode_chat
from models.engine.base import Sequence as Place
from models.engine.base import Step
from models.sampling import shape, softmax, top_ids
from protocol.errors import ConfigError
from protocol.resolve import Message, Mode, Sampling
from tools.eval.notes import KINDS, Case, Kind, cases, informed, public
from tools.eval.recordings import BATCH, Model, Progress, name, recorded

Floats = NDArray[np.float32]
Row = dict[str, Any]
T = TypeVar("T")

MOST = 24  # tokens of an answer
_TOP = 16  # tokens of y that are told, the agent's default
_TEMPERATURE = 0.5  # at 0 verify would be the same as take
_RECIPE = 1  # raised when a recording would come out differently


@dataclass(frozen=True, slots=True)
class Arm:
    """`who`: whose tokens are written; both: `mode` decides what becomes of a step above tau."""

    name: str
    who: Literal["slm", "llm", "informed", "both"]
    mode: Mode = "fuse"
    weight: Weight = 0.5


ARMS = (
    Arm("slm with the note", "slm"),
    Arm("llm without", "llm"),
    Arm("llm with the note", "informed"),  # which no device would do: what the others are held against
    Arm("w 0.25", "both", "fuse", 0.25),
    Arm("w 0.5", "both", "fuse", 0.5),
    Arm("w 0.75", "both", "fuse", 0.75),
    Arm("adaptive", "both", "fuse", "adaptive"),
    Arm("take", "both", "take"),
    Arm("verify", "both", "verify"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """`ids` (n,): what was written; `asked` (n,): whether the cloud was asked for it."""

    ids: NDArray[np.int32]
    asked: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Followed:
    """Of each token of the reference (n,): what the SLM and the LLM without the note, and the LLM with it, give it; how
    sure both sides are, and the SLM's u there. `y` is 1 - w's side of the fusion, its tail lying where x lies."""

    x: Floats
    y: Floats
    informed: Floats
    x_max: Floats
    y_max: Floats
    u: Floats


def evaluate(
    slm: Path,
    llm: Path,
    cache: Path,
    *,
    notes: int,
    tau: float,
    seed: int,
    threads: int,
    say: Progress,
    most: int = MOST,
) -> Row:
    """The object of `skerry eval fusion --json`. Raises ConfigError, BadModelFile, StoreError."""
    small, large = (Model(path, threads=threads, hidden=False) for path in (slm, llm))
    if small.tokenizer.fingerprint != large.tokenizer.fingerprint:
        raise ConfigError("fusion is measured token by token: take two models of one tokenizer")
    asked = cases(notes, seed)
    written: dict[str, list[Answer]] = {arm.name: [] for arm in ARMS}
    led: list[Followed] = []
    try:
        for at in range(0, len(asked), BATCH):  # all arms of a wave find its prompts in the engines' caches
            wave = asked[at : at + BATCH]
            say(f"questions {at + 1} to {at + len(wave)} of {len(asked)}")
            for arm in ARMS:
                written[arm.name] += _answers(arm, small, large, wave, cache, tau, most)
            led += _followed(small, large, wave, cache)
    finally:
        small.close()
        large.close()
    texts = {
        arm: [small.tokenizer.decode([int(id) for id in answer.ids]).decode("utf-8", "replace") for answer in answers]
        for arm, answers in written.items()
    }
    rows = [_row(arm, kind, asked, texts, written[arm.name], led, tau) for arm in ARMS for kind in (None, *KINDS)]
    return {"slm": slm.stem, "llm": llm.stem, "questions": len(asked), "tau": tau, "arms": rows}


def _answers(
    arm: Arm, small: Model, large: Model, wave: Sequence[Case], cache: Path, tau: float, most: int
) -> list[Answer]:
    key = (_RECIPE, small.fingerprint, large.fingerprint, arm.who, arm.mode, arm.weight, tau, most)
    paths = [cache / "fusion" / name(*key, case.question, messages=informed(case)) for case in wave]

    def record(missing: Sequence[int]) -> Iterator[Answer]:
        return _write(arm, small, large, [wave[index] for index in missing], tau, most)

    return recorded(Answer, paths, record, lambda line: None)


class _Reader:
    """One model that reads a wave's answers, all in one pass per token."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[Message]], most: int) -> None:
        self.engine = model.engine
        starts = [encode_chat(self.engine.tokenizer, prompt) for prompt in prompts]
        self._places: list[Place] = [self.engine.open(start, most + 1) for start in starts]
        self._feeds = {
            at: place.align(start) for at, (place, start) in enumerate(zip(self._places, starts, strict=True))
        }

    def steps(self, said: dict[int, int] | None = None) -> dict[int, Step]:
        """After the prompts, then after one more token of each answer that goes on; valid until the next call."""
        feeds = self._feeds if said is None else {at: [token] for at, token in said.items()}
        made = self.engine.forward([(self._places[at], tokens) for at, tokens in feeds.items()])
        return dict(zip(feeds, made, strict=True))

    def close(self) -> None:
        for place in self._places:
            place.close()


def _write(arm: Arm, small: Model, large: Model, wave: Sequence[Case], tau: float, most: int) -> Iterator[Answer]:
    alone = large if arm.who in ("llm", "informed") else small
    writer = _Reader(alone, [public(case) if arm.who == "llm" else informed(case) for case in wave], most)
    helper = _Reader(large, [public(case) for case in wave], most) if arm.who == "both" else None
    ids: list[list[int]] = [[] for _ in wave]
    asked: list[list[bool]] = [[] for _ in wave]
    eog, belief = writer.engine.tokenizer.eog, Softmax(writer.engine.info.vocab)
    said: dict[int, int] | None = None
    while said is None or said:
        own, others = writer.steps(said), helper.steps(said) if helper else {}
        said = {}
        for at, step in own.items():
            sampling = Sampling(temperature=_TEMPERATURE, seed=zlib.crc32(repr(wave[at]).encode()))
            unsure = belief.load(step.logits).entropy() > tau and helper is not None
            token = shape(step.logits, sampling, ids[at]).draw_at(sampling.seed, len(ids[at]))
            if unsure:
                reply = _reply(others[at].logits, token)
                token = combine(arm.mode, arm.weight, token, step.logits, reply, sampling, ids[at], len(ids[at]))
            ids[at].append(token)
            asked[at].append(unsure)
            if token not in eog and len(ids[at]) < most:
                said[at] = token
    writer.close()
    if helper is not None:
        helper.close()
    for written, flags in zip(ids, asked, strict=True):
        yield Answer(np.array(written, np.int32), np.array(flags, bool))


def _reply(logits: Floats, draft: int) -> Reply:
    """As a resolver tells of y: its likeliest tokens at temperature 1."""
    y = softmax(logits)
    ids = top_ids(y, _TOP)
    return Reply([], [], ids, y[ids], float(y[draft]))


def _followed(small: Model, large: Model, wave: Sequence[Case], cache: Path) -> list[Followed]:
    key = (_RECIPE, small.fingerprint, large.fingerprint)
    paths = [cache / "fusion" / name(*key, case.reference, messages=informed(case)) for case in wave]

    def record(missing: Sequence[int]) -> Iterator[Followed]:
        return _follow(small, large, [wave[index] for index in missing])

    return recorded(Followed, paths, record, lambda line: None)


def _follow(small: Model, large: Model, wave: Sequence[Case]) -> Iterator[Followed]:
    targets = [small.tokenizer.encode(case.reference) for case in wave]
    own = _read(small, [informed(case) for case in wave], targets, lambda logits, token: softmax(logits))
    told = _read(large, [public(case) for case in wave], targets, _reply)
    whole = _read(
        large, [informed(case) for case in wave], targets, lambda logits, token: float(softmax(logits)[token])
    )
    for target, xs, replies, with_note in zip(targets, own, told, whole, strict=True):
        rows = []
        for token, x, reply, p in zip(target, xs, replies, with_note, strict=True):
            y = complete(x, reply)
            u = Softmax(len(x)).load(np.log(x + np.float32(1e-30))).entropy()
            rows.append((x[token], y[token], p, x.max(), y.max(), u))
        yield Followed(*np.array(rows, np.float32).T)


def _read(
    model: Model,
    prompts: Sequence[list[Message]],
    targets: Sequence[list[int]],
    note: Callable[[Floats, int], T],
) -> list[list[T]]:
    """What `note` makes of the logits (V,) before each token of each target, and of that token."""
    reader = _Reader(model, prompts, max(map(len, targets)))
    seen: list[list[T]] = [[] for _ in targets]
    said: dict[int, int] | None = None
    while said is None or said:
        for at, step in reader.steps(said).items():
            seen[at].append(note(step.logits, targets[at][len(seen[at])]))
        said = {at: target[len(seen[at]) - 1] for at, target in enumerate(targets) if len(seen[at]) < len(target)}
    reader.close()
    return seen


def _row(
    arm: Arm,
    kind: Kind | None,
    asked: Sequence[Case],
    texts: dict[str, list[str]],
    answers: Sequence[Answer],
    led: Sequence[Followed],
    tau: float,
) -> Row:
    """`right`: share of answers that hold what is expected; `agreement`: F1 of their words with those of the LLM that
    has the note; `nll`: of the reference's tokens, nats; `asked`: share of the tokens that the cloud was asked for."""
    chosen = [at for at, case in enumerate(asked) if kind in (None, case.kind)]
    held = texts["llm with the note"]
    flags = np.concatenate([answers[at].asked for at in chosen])
    return {
        "arm": arm.name,
        "kind": kind or "all",
        "questions": len(chosen),
        "right": _mean([asked[at].expected.lower() in texts[arm.name][at].lower() for at in chosen]),
        "agreement": _mean([f1(texts[arm.name][at], held[at]) for at in chosen]),
        "nll": _mean([value for at in chosen for value in _surprises(arm, led[at], tau)]),
        "asked": 1.0 if arm.who in ("llm", "informed") else _mean(flags.tolist()),
    }


def _surprises(arm: Arm, led: Followed, tau: float) -> list[float]:
    """-log p of each token of the reference. take and verify emit what the LLM says where it is asked."""
    if arm.who == "slm":
        p = led.x
    elif arm.who == "llm":
        p = led.y
    elif arm.who == "informed":
        p = led.informed
    else:
        w: Any = 0.0
        if arm.mode == "fuse":
            w = led.x_max / (led.x_max + led.y_max) if arm.weight == "adaptive" else arm.weight
        p = np.where(led.u > tau, w * led.x + (1.0 - w) * led.y, led.x)
    return [-math.log(max(float(value), 1e-9)) for value in p]


def f1(one: str, other: str) -> float:
    """Of two texts' words, as bags."""
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    common = (a & b).total()
    return 2.0 * common / (a.total() + b.total()) if common else 0.0


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)
