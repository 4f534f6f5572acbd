"""What `skerry eval news` and `skerry eval text` record, on models whose every logit is known."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from agent.uncertainty import PERTURBATIONS, Softmax
from models.chat import encode_chat
from models.sampling import softmax
from protocol.errors import ConfigError, ContextFull, StoreError
from tests.tools.fake_models import FakeEngine, FakeModel, FakeTokenizer
from tools.eval import news, tasks, text
from tools.eval.data import Article
from tools.eval.decisions import Decisions, perturbed, warmed
from tools.eval.led import followed, written
from tools.eval.recordings import Model
from tools.eval.table import Dataset, Item

APART = ("business", "sport", "tech")
TANGLED = ("art", "art history", "artisan", "sport", "sports news")
ARTICLES = [Article("sport", f"Match {n}", f"The team won by {n} goals to none.") for n in range(10)]
SAME = FakeTokenizer(b"the ", b"goal", b"art", b"sport")
OTHER = FakeTokenizer(b"th", b"go", b"al", b"sp", b" hist")


def quiet(line: str) -> None:
    pass


def dataset(labels: tuple[str, ...], count: int = 10) -> Dataset:
    return Dataset(labels, tuple(Item(f"text number {n}", n % len(labels)) for n in range(count)))


def by_hand(engine: FakeEngine, labels: tuple[str, ...], item: Item) -> list[float]:
    """Constrained decoding, one label at a time, without a trie."""
    start = encode_chat(engine.tokenizer, news.messages(labels, item.text))
    ways = [[*engine.tokenizer.encode(label), engine.tokenizer.end_id] for label in labels]
    found = []
    for way in ways:
        p = 1.0
        for at in range(len(way)):
            allowed = sorted({other[at] for other in ways if other[:at] == way[:at]})
            p *= float(softmax(engine.logits([*start, *way[:at]])[allowed])[allowed.index(way[at])])
        found.append(p)
    return found


@pytest.mark.parametrize("labels", [APART, TANGLED])
def test_a_labels_probability_is_that_of_constrained_decoding(labels: tuple[str, ...], tmp_path: Path) -> None:
    model, data = FakeModel("a", SAME), dataset(labels)
    found = news.readings(model, data, tmp_path, quiet)
    for item, reading in zip(data.items, found, strict=True):
        assert reading.p.tolist() == pytest.approx(by_hand(model.fake, labels, item), rel=1e-4)
        assert reading.p.sum() == pytest.approx(1.0, abs=1e-5)


def test_one_pass_is_enough_where_the_first_tokens_differ(tmp_path: Path) -> None:
    model = FakeModel("a", SAME)
    news.readings(model, dataset(APART), tmp_path, quiet)
    assert model.fake.passes == [8, 2]  # ten texts in waves of eight


def test_what_the_running_product_would_see_is_recorded_beside_it(tmp_path: Path) -> None:
    model, data = FakeModel("a", SAME), dataset(TANGLED, 1)
    (reading,) = news.readings(model, data, tmp_path, quiet)
    logits = model.fake.logits(encode_chat(SAME, news.messages(TANGLED, data.items[0].text)))
    p = softmax(logits)
    begin = {SAME.encode(label)[0] for label in TANGLED}
    assert float(reading.entropy) == pytest.approx(-float((p * np.log(p)).sum()) / np.log(SAME.vocab), rel=1e-4)
    assert float(reading.mass) == pytest.approx(float(p[list(begin)].sum()), rel=1e-4)
    assert reading.hidden.tolist() == logits[:8].astype(np.float16).tolist()


def test_labels_that_a_tokenizer_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rename one of them"):
        news.readings(FakeModel("a", SAME), dataset(("sport", "sport\u00e9")), tmp_path, quiet)


def test_a_context_too_small_for_all_at_once_serves_some_at_a_time(tmp_path: Path) -> None:
    data = dataset(TANGLED)
    room = max(len(encode_chat(SAME, news.messages(TANGLED, item.text))) for item in data.items) + 20
    small, large = FakeModel("a", SAME, context=3 * room), FakeModel("a", SAME)
    few = news.readings(small, data, tmp_path / "small", quiet)
    many = news.readings(large, data, tmp_path / "large", quiet)
    assert [reading.p.tolist() for reading in few] == [reading.p.tolist() for reading in many]
    assert max(small.fake.passes) == 3
    with pytest.raises(ContextFull):
        news.readings(FakeModel("a", SAME, context=room // 2), data, tmp_path / "none", quiet)


def news_decisions(cache: Path, slm: FakeModel, llm: FakeModel) -> Decisions:
    return news.decisions(slm, llm, dataset(APART), cache, 0, quiet)


def text_decisions(cache: Path, slm: FakeModel, llm: FakeModel) -> Decisions:
    return text.decisions(slm, llm, ARTICLES[:4], cache, 0, quiet)


def equal(one: Decisions, other: Decisions) -> bool:
    names = [field.name for field in dataclasses.fields(Decisions)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("decide", [news_decisions, text_decisions])
def test_a_second_run_makes_no_pass(decide, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = decide(tmp_path, FakeModel("a", SAME), FakeModel("b", SAME))
    again = FakeModel("a", SAME), FakeModel("b", SAME)
    assert equal(decide(tmp_path, *again), first)
    assert again[0].fake.passes == again[1].fake.passes == []


@pytest.mark.parametrize("decide", [news_decisions, text_decisions])
@pytest.mark.parametrize("harm", ["cut", "empty", "garbage", "other columns", "flipped"])
def test_a_damaged_recording_is_made_again_alone(decide, harm: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = decide(tmp_path, FakeModel("a", SAME), FakeModel("b", SAME))
    path = sorted(tmp_path.rglob("*.npz"))[0]
    whole = path.read_bytes()
    if harm == "other columns":
        np.savez(path, unknown=np.zeros(3))
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
        path.write_bytes({"cut": whole[:-40], "empty": b"", "garbage": os.urandom(300), "flipped": flipped}[harm])
    again = FakeModel("a", SAME), FakeModel("b", SAME)
    assert equal(decide(tmp_path, *again), first)
    assert {fed for model in again for fed in model.fake.passes} <= {1}
    assert path.read_bytes() == whole or harm == "flipped"
    idle = FakeModel("a", SAME), FakeModel("b", SAME)
    decide(tmp_path, *idle)
    assert idle[0].fake.passes == idle[1].fake.passes == []


def test_other_labels_and_other_models_have_recordings_of_their_own(tmp_path: Path) -> None:
    for labels, name in ((APART, "a"), (TANGLED, "a"), (APART, "b")):
        model = FakeModel(name, SAME)
        news.readings(model, dataset(labels), tmp_path, quiet)
        assert model.fake.passes
    assert len(list(tmp_path.rglob("*"))) == 1 + 30  # the folder, and nothing half written


def test_the_small_model_is_led_anew_where_the_answer_is_another_one(tmp_path: Path) -> None:
    prompts = list(text.questions(ARTICLES[:1]))
    slm, first, reworded = FakeModel("a", SAME), FakeModel("b", SAME), FakeModel("b", SAME)
    reworded.fake.seed += 1
    for llm, folder in ((first, tmp_path), (reworded, tmp_path / "elsewhere")):
        answers = written(llm, prompts, folder, quiet)
        steps = followed(slm, llm, prompts, answers, tmp_path, quiet)
        assert [s.token.tolist() for s in steps] == [a.ids.tolist() for a in answers]


def test_a_recording_that_cannot_be_kept_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "news").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="cannot be written"):
        news.readings(FakeModel("a", SAME), dataset(APART), tmp_path, quiet)


def test_a_text_is_judged_by_its_label(tmp_path: Path) -> None:
    slm, llm, data = FakeModel("a", SAME), FakeModel("b", SAME), dataset(APART, 30)
    found = news.decisions(slm, llm, data, tmp_path, 0, quiet)
    x, y = (np.array([by_hand(model.fake, APART, item) for item in data.items]) for model in (slm, llm))
    draft, gold, rows = x.argmax(1), np.array([item.label for item in data.items]), np.arange(30)
    assert found.u == pytest.approx(-(x * np.log(x)).sum(1) / np.log(3), rel=1e-3)
    assert found.p_max == pytest.approx(x.max(1), rel=1e-3)
    assert found.margin == pytest.approx(np.sort(x)[:, -1] - np.sort(x)[:, -2], abs=1e-4)
    assert found.beta == pytest.approx(np.maximum(0, 1 - y[rows, draft] / x[rows, draft]), abs=1e-3)
    assert found.differs.tolist() == (draft != y.argmax(1)).tolist()
    assert found.slm_right.tolist() == (draft == gold).tolist()
    assert found.llm_right.tolist() == (y.argmax(1) == gold).tolist()
    assert found.label.tolist() == gold.tolist()
    assert 0 < found.differs.sum() < 30


def test_open_text_with_one_tokenizer_knows_what_the_llm_thinks_of_each_draft(tmp_path: Path) -> None:
    slm, llm = FakeModel("a", SAME), FakeModel("b", SAME)
    found = text_decisions(tmp_path, slm, llm)
    prompts = list(text.questions(ARTICLES[:4]))
    assert [p.document for p in prompts] == [0, 1, 2, 3] * 3
    for number, prompt in enumerate(prompts):
        sofar = encode_chat(SAME, prompt.messages)
        steps = np.flatnonzero(found.item == number)
        assert found.position[steps].tolist() == list(range(len(steps)))
        for step in steps:
            x, y = softmax(slm.fake.logits(sofar)), softmax(llm.fake.logits(sofar))
            draft, target = int(x.argmax()), int(y.argmax())
            y_d = float(y[draft]) if (y > y[draft]).sum() < 64 else 0.0
            assert found.p_max[step] == pytest.approx(float(x[draft]), rel=1e-3)
            assert found.beta[step] == pytest.approx(max(0.0, 1 - y_d / float(x[draft])), abs=1e-3)
            assert bool(found.differs[step]) == (draft != target) == (not found.slm_right[step])
            assert found.llm_right[step]
            sofar.append(target)
        assert sofar[-1] == SAME.end_id or len(steps) == prompt.max_tokens


def test_with_two_tokenizers_the_small_model_is_led_along_the_same_bytes(tmp_path: Path) -> None:
    slm, llm = FakeModel("a", OTHER), FakeModel("b", SAME)
    prompts = list(text.questions(ARTICLES[:4]))
    answers = written(llm, prompts, tmp_path, quiet)
    for answer, steps in zip(answers, followed(slm, llm, prompts, answers, tmp_path, quiet), strict=True):
        said = SAME.decode(answer.ids.tolist())
        ended = int(answer.ids[-1]) == SAME.end_id
        led = OTHER.decode(steps.token.tolist())
        assert led == said if ended else said.startswith(led) and len(said) - len(led) <= 5
        assert (int(steps.token[-1]) == OTHER.end_id) == ended
        for at, begins in enumerate(steps.begins.tolist()):
            assert OTHER.decode(steps.token[:at].tolist()) == said[:begins]
    found = text_decisions(tmp_path, slm, llm)
    assert len(found.u) == sum(len(s.token) for s in followed(slm, llm, prompts, answers, tmp_path, quiet))
    assert ((found.beta >= 0) & (found.beta <= 1)).all()


def test_the_temperature_measure_is_the_products(tmp_path: Path) -> None:
    logits = np.random.default_rng(1).normal(size=(50, 200)).astype(np.float32) * 2
    warm = np.stack([warmed(row, int(row.argmax())) for row in logits])
    uniforms = np.random.default_rng(7).random(warm.shape)
    for row, drawn, measured in zip(logits, uniforms, perturbed(warm, 7), strict=True):
        belief = Softmax(200).load(row)
        first = np.concatenate([[0.5], drawn])
        assert measured == pytest.approx(belief.perturbation(belief.likeliest, first))
    assert perturbed(warm, 7).max() <= 1 - 1 / PERTURBATIONS
    assert perturbed(warm, -7).tolist() != perturbed(warm, 7).tolist()


def test_the_product_of_real_models(smollm2: Path, smollm2_q2: Path, tmp_path: Path) -> None:
    slm, llm = Model(smollm2_q2, threads=0, hidden=True), Model(smollm2, threads=0, hidden=False)
    data = Dataset(("politics", "sport"), tuple(Item(f"{a.headline}\n{a.text}", 1) for a in ARTICLES[:3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_INSTRUCTIONS", {name: (two, 6) for name, (two, _) in tasks._INSTRUCTIONS.items()})
        news_found = news.decisions(slm, llm, data, tmp_path, 0, quiet)
        text_found = text.decisions(slm, llm, ARTICLES[:1], tmp_path, 0, quiet)
    slm.close()
    llm.close()
    assert news_found.state.shape == (3, 576)
    assert news_found.features.shape[0] == news_found.hidden.shape[0] == 3
    assert (text_found.y_below_x <= (text_found.beta > 0)).all()
    agreed = ~text_found.differs
    assert text_found.beta[agreed].mean() < 0.5
    assert (text_found.prompt_bytes > 0).all()
    assert (text_found.reply_bytes > 100).all()
