"""Open text: the LLM's answers to questions about news articles, token by token, as decisions of the SLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from models.engine.base import Tokenizer
from tools.eval.data import Article
from tools.eval.decisions import Decisions, Ints, features, perturbed, projected, rejection
from tools.eval.dialogue import Dialogue
from tools.eval.drafts import Opinion, opinion
from tools.eval.led import Followed, Written, followed, written
from tools.eval.recordings import BATCH, Model, Progress
from tools.eval.tasks import TEXT_TASKS, Prompt, prompt


def decisions(slm: Model, llm: Model, found: Sequence[Article], cache: Path, seed: int, say: Progress) -> Decisions:
    """The steps along the LLM's answers to TEXT_TASKS about each article. `seed`: of U-HLM's draws and of the
    projection. Raises BadModelFile."""
    prompts = list(questions(found))
    answers = written(llm, prompts, cache, lambda line: say(f"{llm.path.stem}: answers {line}"))
    led = followed(slm, llm, prompts, answers, cache, lambda line: say(f"{slm.path.stem}: steps {line}"))
    views = [opinion(slm.tokenizer, llm.tokenizer, a, s) for a, s in zip(answers, led, strict=True)]
    sizes = _sizes(slm.tokenizer, llm.tokenizer, prompts, answers, led, views)
    counts = [len(steps.token) for steps in led]
    joined = {column: np.concatenate([getattr(steps, column) for steps in led]) for column in Followed.__slots__}
    x, entropy, state = joined["top_x"], joined["entropy"], joined["hidden"]
    y_d = np.concatenate([view.y for view in views])
    agrees = np.concatenate([view.agrees for view in views])
    position = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    tasks = [TEXT_TASKS.index(p.task) for p in prompts]
    return Decisions(
        slm=slm.path.stem,
        llm=llm.path.stem,
        u=entropy,
        u_other=entropy,
        p_max=x[:, 0],
        margin=x[:, 0] - x[:, 1],
        temperature=perturbed(joined["warm"], seed),
        beta=rejection(x[:, 0], y_d),
        y_below_x=y_d < x[:, 0],
        differs=~agrees,
        slm_right=agrees,
        llm_right=np.ones(len(agrees), bool),
        item=np.repeat(np.arange(len(prompts), dtype=np.int32), counts),
        document=np.repeat(np.array([p.document for p in prompts], np.int32), counts),
        position=position,
        label=np.repeat(np.array(tasks, np.int32), counts),
        labels=TEXT_TASKS,
        features=features(entropy, x[:, 0], x[:, 0] - x[:, 1], position),
        hidden=projected(state, seed),
        state=state,
        prompt_bytes=sizes[:, 0],
        token_bytes=sizes[:, 1],
        reply_bytes=sizes[:, 2],
        open_bytes=sizes[:, 3],
    )


def questions(found: Sequence[Article]) -> Iterator[Prompt]:
    """Ordered so that answers that are written at once are of different articles, and the next ones find an article in
    the engine's cache."""
    for start in range(0, len(found), BATCH):
        for task in TEXT_TASKS:
            for document in range(start, min(start + BATCH, len(found))):
                yield prompt(task, 0, document, found[document])


def _sizes(
    slm: Tokenizer,
    llm: Tokenizer,
    prompts: Sequence[Prompt],
    answers: Sequence[Written],
    led: Sequence[Followed],
    views: Sequence[Opinion],
) -> Ints:
    """(n, 4): bytes of each step's Ask, of its token in the next Ask, of its Answer, and of Open and Close."""
    dialogue = Dialogue(slm, llm)
    same = slm.fingerprint == llm.fingerprint
    found = []
    for question, answer, steps, view in zip(prompts, answers, led, views, strict=True):
        opened = dialogue.open(question.messages)
        written = steps.begins if not same else np.arange(len(steps.token))
        for keep, draft, token, said in zip(written, steps.top_ids[:, 0], steps.token, view.said, strict=True):
            reply = dialogue.answer(answer.ids[said.start : said.stop].tolist(), answer.top_ids[said.start].tolist())
            found.append((dialogue.ask(int(keep), int(draft)), dialogue.said(int(token)), reply, opened))
    return np.array(found, np.int32)
