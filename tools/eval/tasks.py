"""What the simulated devices are asked about the articles, each task in two wordings."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.resolve import Message
from tools.eval.data import Article

_EXAMPLES = (
    (
        "Shares in the carmaker fell by three per cent after it warned that profits would be lower this year.",
        "business",
    ),
    ("The singer's new album went straight to number one and she will tour Europe in the autumn.", "entertainment"),
    ("Ministers will vote on the bill next week, and the opposition has called it a waste of money.", "politics"),
    ("The striker scored twice in the second half to take the team to the final.", "sport"),
    ("A security hole in the popular browser lets attackers read files on a user's computer.", "tech"),
)
_SORT = (
    "Sort the news into business, entertainment, politics, sport or tech. Answer with one word.",
    "To which section of the paper does this belong: business, entertainment, politics, sport, tech? One word only.",
)
_INSTRUCTIONS = {  # task: two wordings, most tokens of the answer
    "summarise": (("Summarise this article in two sentences.", "Tell me in brief what this article says."), 48),
    "continue": (("Continue this article.", "Write the sentences that come next in this text."), 48),
    "headline": (("Write a headline for this article.", "What would be a good title for this text?"), 16),
    "question": (("Who is this article about, and what happened?", "What happened here, and to whom?"), 48),
}
OPEN_TASKS = ("summarise", "continue", "headline")  # of `skerry eval memory`
TEXT_TASKS = ("continue", "summarise", "question")  # of `skerry eval text`
TASKS = ("topic", *OPEN_TASKS)
_TOPIC_CHARACTERS, _OPEN_CHARACTERS = 300, 600


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `document`: the article's index; `wording`: 0, or 1 for the same question in other words."""

    task: str
    wording: int
    document: int
    messages: tuple[Message, ...]
    max_tokens: int


def prompt(task: str, wording: int, document: int, article: Article) -> Prompt:
    whole = f"{article.headline}\n{article.text}"
    if task == "topic":
        messages = [Message("system", _SORT[wording])]
        for text, label in _EXAMPLES:
            messages += [Message("user", text), Message("assistant", label)]
        return Prompt(task, wording, document, (*messages, Message("user", _cut(whole, _TOPIC_CHARACTERS))), 1)
    wordings, max_tokens = _INSTRUCTIONS[task]
    content = f"{_cut(whole, _OPEN_CHARACTERS)}\n\n{wordings[wording]}"
    return Prompt(task, wording, document, (Message("user", content),), max_tokens)


def _cut(text: str, characters: int) -> str:
    return " ".join(text[:characters].split())
