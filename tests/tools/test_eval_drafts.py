"""What the LLM thinks of drafts, and what asking it costs: against the product's own decisions and messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.sampling import softmax
from protocol import resolve as wire
from protocol.resolve import Answer, Ask, Close, More, Open, Sampling
from server.cloud.text import Pieces, decide_text
from tests.tools.fake_models import FakeEngine, FakeModel, FakeTokenizer
from tools.eval import text
from tools.eval.data import Article
from tools.eval.dialogue import Dialogue
from tools.eval.drafts import Opinion, opinion
from tools.eval.led import Followed, Written, followed, written

LLM = FakeTokenizer(b"the ", b"goal", b"keeper", b"s")
SLM = FakeTokenizer(b"the", b"goalk", b"keep", b"goalkeeper saves", b"er sa")


def quiet(line: str) -> None:
    pass


def spoken(*pieces: bytes, p: float = 0.5, ended: bool = False) -> Written:
    """An answer of these tokens with probability `p` each; of the rest of the mass nine tenths are on `z`."""
    ids = [LLM.pieces.index(piece) for piece in pieces] + [LLM.end_id] * ended
    likely = [[token, ord("z"), LLM.end_id if token != LLM.end_id else ord("q")] for token in ids]
    y = [[p, (1 - p) * 0.9, (1 - p) * 0.1]] * len(ids)
    return Written(np.array(ids), np.array(likely), np.array(y, np.float32), np.zeros(len(ids), np.float32))


def asked(*drafts: tuple[int, bytes | int]) -> Followed:
    """One step per draft, given as (bytes before it, its token or the bytes of that)."""
    ids = [[draft if isinstance(draft, int) else SLM.pieces.index(draft)] for _, draft in drafts]
    nothing = np.zeros((len(drafts), 1), np.float32)
    begins = np.array([at for at, _ in drafts])
    return Followed(np.array(ids)[:, 0], begins, np.array(ids), nothing, nothing[:, 0], nothing, nothing.astype("f2"))


def judged(answer: Written, at: int, draft: bytes | int) -> Opinion:
    return opinion(SLM, LLM, answer, asked((at, draft)))


GOAL = spoken(b"goal", b"keeper", b"s", ended=True)  # goalkeepers


@pytest.mark.parametrize(
    ("at", "draft", "y", "agrees", "tokens"),
    [
        (0, b"g", 0.5, True, 1),  # the beginning of the LLM's token
        (0, b"z", 0.45, False, 1),
        (0, b"x", 0.0, False, 1),
        (0, b"goalk", 0.5 * 0.5, True, 2),  # goes on into the next one
        (0, b"goalkeeper saves", 0.0, False, 3),  # agrees as far as goalkeepers does not
        (4, b"keep", 0.5, True, 1),
        (6, b"e", 1.0, True, 1),  # inside a token: what comes is decided
        (6, b"x", 0.0, False, 1),
        (8, b"er sa", 0.0, False, 2),
        (6, SLM.end_id, 0.0, False, 1),
        (10, SLM.end_id, 0.05, False, 1),
        (11, SLM.end_id, 0.5, True, 1),
        (11, b"z", 0.45, False, 1),
        (0, SLM.control_id, 0.0, False, 1),
    ],
)
def test_with_two_tokenizers_bytes_decide(at: int, draft: bytes | int, y: float, agrees: bool, tokens: int) -> None:
    found = judged(GOAL, at, draft)
    assert found.y[0] == pytest.approx(y, abs=1e-6)
    assert bool(found.agrees[0]) is agrees
    assert len(found.said[0]) == tokens


def test_beyond_the_end_of_a_cut_answer_the_draft_gets_the_benefit_of_the_doubt() -> None:
    cut = spoken(b"goal", b"k")
    assert judged(cut, 4, b"keep").agrees[0]
    assert judged(cut, 4, b"keep").y[0] == pytest.approx(0.5)
    assert not judged(cut, 4, SLM.end_id).agrees[0]
    assert judged(spoken(b"goal", b"k", ended=True), 4, b"keep").y[0] == 0.0


def test_with_one_tokenizer_tokens_decide() -> None:
    steps = asked(*((0, token) for token in (LLM.pieces.index(b"goal"), ord("z"), ord("g"))))
    found = opinion(LLM, LLM, spoken(b"goal", b"keeper", b"goal"), steps)
    assert found.y.tolist() == pytest.approx([0.5, 0.45, 0.0])  # a prefix of the LLM's token is another token
    assert found.agrees.tolist() == [True, False, False]
    assert found.said == [range(0, 1), range(1, 2), range(2, 3)]


def greedy(engine: FakeEngine, prompt: list[int], count: int) -> Written:
    """The whole of y at each step."""
    tokens, ids, likely, y = list(prompt), [], [], []
    for _ in range(count):
        p = softmax(engine.logits(tokens))
        ids.append(int(p.argmax()))
        likely.append(np.argsort(-p, kind="stable"))
        y.append(p[likely[-1]])
        tokens.append(ids[-1])
        if ids[-1] in engine.tokenizer.eog:
            break
    return Written(np.array(ids), np.stack(likely), np.stack(y), np.zeros(len(ids), np.float32))


@pytest.mark.parametrize("seed", range(20))
def test_where_an_llm_token_begins_the_cloud_says_the_same(seed: int) -> None:
    engine, prompt = FakeEngine(LLM, seed), LLM.encode("a prompt")
    answer = greedy(engine, prompt, 6)
    pieces, opened = Pieces(LLM), Open(1, "a prompt", SLM.fingerprint, Sampling(), "take", 16)
    said = [LLM.piece(token) for token in answer.ids.tolist()]
    for row in range(len(said) - 3):  # further on, a draft might outlast what was recorded
        at, rest = len(b"".join(said[:row])), b"".join(said[row:])
        for draft in [rest[:1], rest[:2], rest[:3], b"g", b"goal"]:
            asks = Ask(1, 1, 0, draft_text=draft)
            job = decide_text(pieces, opened, asks, [*prompt, *answer.ids[:row].tolist()], at, len(prompt))
            tokens, reply = next(job), None
            while reply is None:
                try:
                    tokens = job.send(engine.logits(tokens))
                except StopIteration as end:
                    reply = end.value[0]
            slm = FakeTokenizer(draft)
            found = opinion(slm, LLM, answer, asked((at, slm.encode(draft)[0])))
            assert found.y[0] == pytest.approx(reply.y_draft, abs=1e-4)
            assert bool(found.agrees[0]) == reply.text.startswith(draft)


@pytest.mark.parametrize("slm", [LLM, SLM], ids=["one tokenizer", "two tokenizers"])
def test_a_conversation_costs_what_its_messages_weigh(slm: FakeTokenizer, tmp_path: Path) -> None:
    """Three steps of one request are escalated; tokens go up with the Ask that follows them."""
    articles = [Article("sport", "Match", "The keeper held all goals.")] * 2
    one, other = FakeModel("a", slm), FakeModel("b", LLM)
    found = text.decisions(one, other, articles, tmp_path, 0, quiet)
    rows = np.flatnonzero(found.item == 1)
    escalated = np.zeros(len(found.u), bool)
    escalated[rows[[2, 3, 7]]] = True
    prompts = list(text.questions(articles))
    messages = prompts[1].messages
    answers = written(other, prompts, tmp_path, quiet)
    led = followed(one, other, prompts, answers, tmp_path, quiet)[1]
    token, drafts = led.token.tolist(), led.top_ids[:, 0].tolist()
    frames: list[wire.FromDevice] = [Open(1, list(messages), slm.fingerprint, Sampling(), "take", 16), Close(1)]
    sent = 0
    for step, at in enumerate((2, 3, 7), start=1):
        new = token[sent:at]
        if slm is LLM:
            frames.append(Ask(1, step, sent, new, drafts[at]))
        else:
            keep = len(slm.decode(token[:sent]))
            frames.append(Ask(1, step, keep, text=slm.decode(new), draft_text=slm.piece(drafts[at])))
        sent = at
    exact = sum(wire.wire_size(len(wire.encode(frame)), masked=True) for frame in frames)
    assert found.traffic(escalated)[0] == pytest.approx(exact, abs=3)
    assert found.traffic(escalated)[1] == int(found.reply_bytes[escalated].sum())
    assert found.traffic(np.zeros(len(found.u), bool)) == (0, 0)


def test_answers_weigh_what_the_cloud_sends() -> None:
    top, logp = list(range(97, 113)), np.zeros(16, np.float32)
    p = wire.pack_floats(logp[:1])
    numbers = Answer(1, 1, [98], b"", wire.pack_ids(np.array(top)), [], wire.pack_floats(logp), 0.5, 1, p)
    assert Dialogue(LLM, LLM).answer([98], top) == wire.wire_size(len(wire.encode(numbers)), masked=False)
    letters = [LLM.piece(token) for token in top]
    spelled = Answer(1, 1, [], b"goals", b"", letters, wire.pack_floats(logp), 0.5, 2)
    said = LLM.encode(b"goals")
    assert Dialogue(SLM, LLM).answer(said, top) == wire.wire_size(len(wire.encode(spelled)), masked=False)
    assert Dialogue(SLM, LLM).more(said[0]) == len(wire.encode(More(1, 1, text=b"goal"))) + 2
