"""Classification of texts, zero-shot: what a model makes of each text's label, decided over the labels alone.

The answer is constrained to the labels: at each fork of the trie of their tokens the next token's distribution is cut
to those that may follow, and a label's probability is the product along its way. That costs one pass per text where
the labels' first tokens differ.

u is the entropy over the K labels, H / ln K. The other candidate, the entropy of the next token over the whole
vocabulary, tells less about whether the LLM decides otherwise: AUC 0.80 to 0.88 against 0.72 to 0.92 with Qwen2.5-Coder
0.5B and 0.59 to 0.63 against 0.25 to 0.48 with SmolLM2, in a pilot on 40 articles with three wordings of the prompt.
It is kept as `u_other`: on 400 other articles, with the wording below, 0.54 against 0.58 and 0.64 against 0.40.

The models' belief is taken as it is. Small models prefer some labels whatever the text, which spoils both their answers
and their entropy; dividing by the mean belief (Zhou et al., ICLR 2024) would mend that here, where labels are about
equally frequent, and do harm where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.uncertainty import Softmax
from models.chat import encode_chat
from models.engine.base import Engine, Tokenizer
from models.sampling import softmax
from protocol.errors import ConfigError
from protocol.resolve import Message
from tools.eval.data import LABELS, articles
from tools.eval.decisions import Decisions, Floats, Halves, Ints, features, perturbed, projected, rejection, warmed
from tools.eval.dialogue import Dialogue
from tools.eval.recordings import Model, Progress, name, recorded
from tools.eval.table import Dataset, Item, distinct, visible

_RECIPE = 1  # raised when a recording would come out differently

Tokens = tuple[int, ...]
Labels = NDArray[np.intp]  # (n,) indices


@dataclass(frozen=True, slots=True)
class Reading:
    """One model's view of one text. `p` (K,): its distribution over the labels; `entropy`: H / ln V of its next token
    over the whole vocabulary; `mass`: how much of that token's probability begins a label; `hidden` (d,): the last
    hidden state there, or (0,)."""

    p: Floats
    entropy: Floats
    mass: Floats
    hidden: Halves


def bbc(cache: Path, documents: int, seed: int) -> Dataset:
    """The first articles in an order drawn by `seed`. Raises SourceUnreachable, HashMismatch."""
    found = articles(cache, seed)
    items = (Item(f"{article.headline}\n{article.text}", LABELS.index(article.label)) for article in found)
    return Dataset(LABELS, distinct(items)[:documents])


def messages(labels: Sequence[str], text: str) -> list[Message]:
    """The labels come first, so that all texts share the beginning, which is then computed once."""
    listed = "\n".join(f"- {label}" for label in labels)
    system = (
        f"You sort texts. These are the labels:\n{listed}\n"
        "Reply with the label that fits the user's text, and nothing else."
    )
    return [Message("system", system), Message("user", f"{visible(text)}\n\nWhich of the labels fits this text?")]


def readings(model: Model, data: Dataset, cache: Path, say: Progress) -> list[Reading]:
    """What the model makes of each item. Raises ConfigError if two labels are the same to it, ContextFull."""
    asked = [messages(data.labels, item.text) for item in data.items]
    key = (_RECIPE, model.fingerprint, model.hidden, data.labels)
    paths = [cache / "news" / name(*key, messages=prompt) for prompt in asked]

    def record(wave: Sequence[int]) -> Iterator[Reading]:
        return _read(model.engine, data.labels, [asked[index] for index in wave])

    return recorded(Reading, paths, record, say)


def _read(engine: Engine, labels: Sequence[str], asked: Sequence[Sequence[Message]]) -> Iterator[Reading]:
    """As many texts at once as the context has room for. Raises ContextFull."""
    written = spelled(engine.tokenizer, labels)
    starts = [encode_chat(engine.tokenizer, prompt) for prompt in asked]
    at_once = max(1, engine.context // (max(map(len, starts)) + max(map(len, written))))
    for at in range(0, len(starts), at_once):
        yield from _pass(engine, written, starts[at : at + at_once])


def _pass(engine: Engine, written: Sequence[Tokens], starts: Sequence[list[int]]) -> Iterator[Reading]:
    """One pass over the prompts, and one more for each beginning that several labels share."""
    forks = branches(written)
    first = sorted({label[0] for label in written})
    places = [engine.open(start, max(map(len, written))) for start in starts]
    belief = Softmax(engine.info.vocab)
    likely: list[dict[Tokens, float]] = [{} for _ in starts]  # of each way on from a fork
    seen: list[tuple[float, float, Halves]] = []
    for begun in [(), *(fork for fork in forks if fork)]:
        feeds = [(place, place.align([*start, *begun])) for place, start in zip(places, starts, strict=True)]
        following = list(forks.get(begun, ()))
        for index, step in enumerate(engine.forward(feeds)):
            if not begun:
                belief.load(step.logits)
                hidden = np.array([] if step.hidden is None else step.hidden, np.float16)
                seen.append((belief.entropy(), sum(map(belief.p, first)), hidden))
            if following:
                shares = softmax(step.logits[following]).tolist()
                likely[index] |= {(*begun, token): share for token, share in zip(following, shares, strict=True)}
    for place in places:
        place.close()
    for ways, (entropy, mass, hidden) in zip(likely, seen, strict=True):
        yield Reading(labels_product(written, ways), np.array(entropy, np.float32), np.array(mass, np.float32), hidden)


def spelled(tokenizer: Tokenizer, labels: Sequence[str]) -> list[Tokens]:
    """Each label's tokens with the end, without which a label that another one continues could not be told from it."""
    written = [(*tokenizer.encode(label), tokenizer.end_id) for label in labels]
    alike = {path for path in written if written.count(path) > 1}
    if alike:
        which = [label for label, path in zip(labels, written, strict=True) if path in alike]
        raise ConfigError(f"labels that are the same to the model: {', '.join(map(repr, which))}; rename one of them")
    return written


def branches(written: Sequence[Tokens]) -> dict[Tokens, tuple[int, ...]]:
    """The forks of the labels' trie: each beginning at which labels part, and the tokens that may follow it."""
    following: dict[Tokens, dict[int, None]] = {}
    for path in written:
        for at, token in enumerate(path):
            following.setdefault(path[:at], {})[token] = None
    return {prefix: tuple(tokens) for prefix, tokens in following.items() if len(tokens) > 1}


def labels_product(written: Sequence[Tokens], likely: dict[Tokens, float]) -> Floats:
    """(K,), sum 1: constrained decoding's probability of each label, a factor for each fork on its way."""
    p = [math.prod(likely.get(label[: at + 1], 1.0) for at in range(len(label))) for label in written]
    return np.array(p, np.float32)


def decisions(slm: Model, llm: Model, data: Dataset, cache: Path, seed: int, say: Progress) -> Decisions:
    """One step per item. `seed`: of U-HLM's draws and of the projection. Raises ConfigError, ContextFull,
    BadModelFile."""
    of_llm = readings(llm, data, cache, lambda line: say(f"{llm.path.stem}: news {line}"))
    of_slm = readings(slm, data, cache, lambda line: say(f"{slm.path.stem}: news {line}"))
    x, y = (np.stack([reading.p for reading in found]) for found in (of_slm, of_llm))
    n, rows = len(x), np.arange(len(x))
    gold = np.array([item.label for item in data.items], np.int32)
    draft, said = x.argmax(axis=1), y.argmax(axis=1)
    x_d, y_d = x[rows, draft], y[rows, draft]
    margin = x_d - np.partition(x, -2, axis=1)[:, -2]
    entropy = _entropy(x)
    state = np.stack([reading.hidden for reading in of_slm])
    none = np.zeros(n, np.int32)
    sizes = _sizes(slm.tokenizer, llm.tokenizer, data, draft, said)
    return Decisions(
        slm=slm.path.stem,
        llm=llm.path.stem,
        u=entropy,
        u_other=np.array([reading.entropy for reading in of_slm], np.float32),
        p_max=x_d,
        margin=margin,
        temperature=perturbed(np.stack([warmed(log_x, int(d)) for log_x, d in zip(_log(x), draft, strict=True)]), seed),
        beta=rejection(x_d, y_d),
        y_below_x=y_d < x_d,
        differs=draft != said,
        slm_right=draft == gold,
        llm_right=said == gold,
        item=rows.astype(np.int32),
        document=rows.astype(np.int32),
        position=none,
        label=gold,
        labels=data.labels,
        features=features(entropy, x_d, margin, none),
        hidden=projected(state, seed),
        state=state,
        prompt_bytes=sizes[:, 0],
        token_bytes=none,
        reply_bytes=sizes[:, 1],
        open_bytes=sizes[:, 2],
    )


def _log(x: Floats) -> Floats:
    return np.log(np.maximum(x, np.float32(1e-30)))


def _entropy(x: Floats) -> Floats:
    """(n,): H(x) / ln K of x (n, K)."""
    entropy: Floats = -(x * _log(x)).sum(axis=1) / np.float32(math.log(x.shape[1]))
    return np.clip(entropy, 0.0, 1.0)


def _sizes(slm: Tokenizer, llm: Tokenizer, data: Dataset, draft: Labels, said: Labels) -> Ints:
    """(n, 3): bytes of each item's Ask, of its replies, and of Open and Close.

    The Ask names the first token of the SLM's label; the Answer brings the first of the LLM's, and the rest of the
    label comes behind it as a burst. The likeliest tokens that an Answer carries were not recorded: beginnings of
    labels stand for them, which have a word's length.
    """
    ours, theirs = spelled(slm, data.labels), spelled(llm, data.labels)
    dialogue = Dialogue(slm, llm)
    alternatives = [label[0] for label in theirs]
    found = []
    for item, d, s in zip(data.items, draft.tolist(), said.tolist(), strict=True):
        ask = dialogue.ask(0, ours[d][0])
        reply = dialogue.answer(theirs[s][:1], alternatives) + sum(map(dialogue.more, theirs[s][1:-1]))
        found.append((ask, reply, dialogue.open(messages(data.labels, item.text))))
    return np.array(found, np.int32)
