"""Each request with an adapter of its own: chosen, kept to the end, told of, and of no effect on others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from agent.adapt.router import Router, embed
from agent.adapt.shelf import Used
from agent.adapt.store import OWN, PRIVATE
from agent.agent import Account, Agent, Event, Options, Piece, Request
from agent.api import schema
from agent.api.answer import Portion
from agent.api.metrics import Metrics
from agent.api.render import Head, TextRendering
from agent.device import Device
from agent.memory.key import KeyMaker
from agent.policy import ThresholdPolicy
from agent.resolver import Question, Reply
from models.adapter import Adapter, Factors, write
from models.engine.base import Sequence as Place
from models.engine.base import Step
from models.engine.gguf import GgufEngine
from protocol.errors import BadAdapter, RequestError
from protocol.resolve import Sampling
from tests.agent.scripted import ScriptedResolver, says

HOME, AWAY, ELSEWHERE = "Once upon a time", "Water boils at", "def add(a, b):"
GREEDY = Sampling(temperature=0.0)
PATIENCE = 120.0


class Counting(GgufEngine):
    """Counts the tokens that it reads."""

    fed = 0

    def forward(self, feeds: Sequence[tuple[Place, Sequence[int]]]) -> list[Step]:
        self.fed += sum(len(tokens) for _, tokens in feeds)
        return super().forward(feeds)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Counting]:
    engine = Counting(smollm2, context=320, sequences=3, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def keys(engine: Counting) -> KeyMaker:
    """Without calibration: what is alike has cosine 1, and the rest of these tests' prompts less than 0.98."""
    width = engine.info.width
    return KeyMaker(b"", np.zeros(width, np.float32), np.ones(width, np.float32))


@pytest.fixture(scope="module")
def files(engine: Counting, keys: KeyMaker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that turn the model's head, whose prompts were HOME and AWAY."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, text) in enumerate({"home": HOME, "away": AWAY}.items()):
        centroid = embed(engine, keys, engine.tokenizer.encode(text, start=True))
        made[name] = made_of(engine, folder / f"{name}.gguf", seed, centroid)
    made["unknown"] = made_of(engine, folder / "unknown.gguf", 7, None)
    return made


def made_of(engine: Counting, path: Path, seed: int, centroid: NDArray[np.float32] | None) -> Path:
    random, width = np.random.default_rng(seed), engine.info.width
    a = random.normal(0.0, 0.3, (4, width)).astype(np.float32)
    factors = {f"blk.{layer}.attn_q": Factors(a, np.ascontiguousarray(a.T)) for layer in (4, 12, 20, 28)}
    write(Adapter(engine.info.fingerprint, engine.info.architecture, 8.0, factors, centroid), path)
    return path


class Listener:
    """Collects one answer's events. `hold`: the answer stands still at its first piece until `go_on` is set."""

    def __init__(self, *, hold: bool = False) -> None:
        self.ids: list[int] = []
        self.account: Account | None = None
        self.error: Exception | None = None
        self.began, self.ended, self.go_on = threading.Event(), threading.Event(), threading.Event()
        if not hold:
            self.go_on.set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.ids.append(event.token.id)
            self.began.set()
            assert self.go_on.wait(PATIENCE)
            return
        if isinstance(event, Account):
            self.account = event
        else:
            self.error = event
        self.ended.set()

    def wait(self) -> Account:
        assert self.ended.wait(PATIENCE)
        assert self.account is not None, self.error
        return self.account


Build = Callable[..., Agent]


@pytest.fixture
def build(engine: Counting, keys: KeyMaker) -> Iterator[Build]:
    agents: list[Agent] = []

    def make(
        resolver: ScriptedResolver | None = None, threshold: float = 1.0, mix: int = 1, near: float = 0.98
    ) -> Agent:
        options = Options(ThresholdPolicy(threshold))
        agents.append(Agent(engine, options, resolver, router=Router(keys, mix, near)))
        return agents[-1]

    yield make
    for agent in agents:
        agent.shelf.replace({})
        agent.scheduler.close()


@pytest.fixture
def agent(build: Build, files: dict[str, Path]) -> Agent:
    agent = build()
    agent.shelf.replace({OWN: files["home"], "fleet.0": files["away"]})
    return agent


def ask(agent: Agent, prompt: str, adapter: str = "auto", *, private: bool = False, hold: bool = False) -> Listener:
    listener = Listener(hold=hold)
    agent.submit(Request(prompt, 10, GREEDY, private=private, adapter=adapter), listener)
    return listener


def written(agent: Agent, prompt: str, adapter: str = "auto", *, private: bool = False) -> tuple[list[int], Account]:
    listener = ask(agent, prompt, adapter, private=private)
    account = listener.wait()
    return listener.ids, account


def slots(account: Account) -> list[str]:
    return [used.slot for used in account.adapters]


class TestChoice:
    @pytest.mark.parametrize(("prompt", "slot"), [(HOME, [OWN]), (AWAY, ["fleet.0"]), (ELSEWHERE, [])])
    def test_a_request_gets_what_is_near(self, agent: Agent, prompt: str, slot: list[str]) -> None:
        ids, account = written(agent, prompt)
        assert slots(account) == slot
        named, _ = written(agent, prompt, slot[0] if slot else "none")
        assert ids == named
        assert (ids != written(agent, prompt, "none")[0]) == bool(slot)

    def test_an_id_may_be_cut_short(self, agent: Agent) -> None:
        (own, fleet) = sorted(agent.shelf.entries, key=lambda entry: entry.slot == "fleet.0")
        _, account = written(agent, ELSEWHERE, fleet.id[:12])
        assert account.adapters == (Used("fleet.0", fleet.id, 1.0),)
        assert own.id != fleet.id

    @pytest.mark.parametrize("adapter", ["fleet.7", "ff" * 32, ""])
    def test_one_that_is_not_in_use_is_refused(self, agent: Agent, adapter: str) -> None:
        with pytest.raises(RequestError, match="in use") as caught:
            ask(agent, HOME, adapter)
        assert caught.value.param == "skerry.adapter"

    def test_one_without_centroid_is_used_by_name_alone(self, build: Build, files: dict[str, Path]) -> None:
        agent = build(near=-1.0)
        agent.shelf.replace({OWN: files["unknown"]})
        assert slots(written(agent, HOME)[1]) == []
        assert slots(written(agent, HOME, OWN)[1]) == [OWN]

    def test_what_learned_from_private_requests_writes_private_ones_alone(
        self, build: Build, files: dict[str, Path]
    ) -> None:
        agent = build(near=-1.0)
        agent.shelf.replace({OWN: files["home"], PRIVATE: files["away"]})
        assert slots(written(agent, AWAY)[1]) == [OWN]
        assert slots(written(agent, HOME, private=True)[1]) == [PRIVATE]
        with pytest.raises(RequestError, match="private"):
            ask(agent, AWAY, PRIVATE)

    def test_an_empty_shelf_costs_nothing(self, build: Build, engine: Counting) -> None:
        agent = build()
        prompt = len(agent.encode(ELSEWHERE + " return"))
        before = engine.fed
        assert written(agent, ELSEWHERE + " return")[1].adapters == ()
        assert engine.fed - before <= prompt + 10

    def test_several_are_mixed_and_belong_to_no_space(self, build: Build, files: dict[str, Path]) -> None:
        asked: list[Question] = []

        def opinion(question: Question) -> Reply:
            asked.append(question)
            return says(question.draft)

        agent = build(ScriptedResolver(opinion), threshold=0.0, mix=2, near=-1.0)
        agent.shelf.replace({OWN: files["home"], "fleet.0": files["away"]})
        _, account = written(agent, HOME)
        assert len(account.adapters) == 2
        assert sum(used.weight for used in account.adapters) == pytest.approx(1.0)
        assert max(account.adapters, key=lambda used: used.weight).slot == OWN
        assert {question.state for question in asked} == {None}
        asked.clear()
        _, account = written(agent, HOME, OWN)
        assert {question.state.adapter for question in asked if question.state} == {account.adapters[0].id}


class TestExchange:
    def test_an_answer_keeps_its_adapter_to_its_end(
        self, agent: Agent, files: dict[str, Path], engine: Counting
    ) -> None:
        undisturbed, account = written(agent, HOME)
        begun = ask(agent, HOME, hold=True)
        assert begun.began.wait(PATIENCE)
        exchange = threading.Thread(target=agent.shelf.replace, args=({OWN: files["away"]},))
        exchange.start()
        begun.go_on.set()
        assert begun.wait().adapters == account.adapters
        exchange.join(PATIENCE)
        assert begun.ids == undisturbed
        assert engine.attached == {entry.id for entry in agent.shelf.entries}
        with pytest.raises(RequestError):
            ask(agent, HOME, account.adapters[0].id)

    def test_what_is_damaged_changes_nothing(self, agent: Agent, files: dict[str, Path], tmp_path: Path) -> None:
        before, attached = agent.shelf.entries, agent.engine.attached
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(files["unknown"].read_bytes()[:-100])
        with pytest.raises(BadAdapter):
            agent.shelf.replace({OWN: files["unknown"], "fleet.0": damaged})
        foreign = tmp_path / "foreign.gguf"
        info = agent.engine.info
        pair = Factors(np.ones((1, info.width), np.float32), np.ones((info.width, 1), np.float32))
        write(Adapter("ab" * 32, info.architecture, 1.0, {"blk.0.attn_q": pair}), foreign)
        with pytest.raises(BadAdapter, match="another model"):
            agent.shelf.replace({"fleet.0": files["unknown"], "fleet.1": foreign})
        assert agent.shelf.entries == before
        assert agent.engine.attached == attached

    def test_one_that_is_taken_away_while_a_request_waits_is_no_longer_there(
        self, agent: Agent, files: dict[str, Path]
    ) -> None:
        holding = [ask(agent, ELSEWHERE, "none", hold=True) for _ in range(3)]
        assert all(listener.began.wait(PATIENCE) for listener in holding[:1])
        waiting, named = ask(agent, HOME), ask(agent, HOME, OWN)
        exchange = threading.Thread(target=agent.shelf.replace, args=({"fleet.0": files["away"]},))
        exchange.start()
        for listener in holding:
            listener.go_on.set()
        exchange.join(PATIENCE)
        assert slots(waiting.wait()) in ([], [OWN])  # written before or after it went
        assert named.ended.wait(PATIENCE)
        assert named.account is not None or isinstance(named.error, RequestError)

    def test_concurrent_answers_do_not_change_each_other(self, agent: Agent) -> None:
        wanted = {adapter: written(agent, ELSEWHERE, adapter)[0] for adapter in (OWN, "fleet.0", "none")}
        listeners = {adapter: ask(agent, ELSEWHERE, adapter) for adapter in wanted}
        for listener in listeners.values():
            listener.wait()
        assert {adapter: listener.ids for adapter, listener in listeners.items()} == wanted
        assert len(set(map(tuple, wanted.values()))) == 3

    def test_a_conversation_that_goes_on_is_not_read_anew(self, agent: Agent, engine: Counting) -> None:
        story = "The old lighthouse keeper climbed the stairs once more, and with every step he counted the years."
        written(agent, story, OWN)
        written(agent, AWAY, "fleet.0")
        before = engine.fed
        written(agent, story + " It", OWN)
        assert engine.fed - before <= 10 + 3


class TestTold:
    def test_in_the_request(self) -> None:
        defaults = schema.Defaults(16, lambda: 1)

        def asked(extension: object) -> Request:
            return schema.completion(msgspec.json.encode({"prompt": "x", "skerry": extension}), defaults).request

        assert asked({}).adapter == "auto"
        assert asked({"adapter": "own"}).adapter == "own"
        for wrong in ("", 7, "x" * 65):
            with pytest.raises(RequestError, match="adapter"):
                asked({"adapter": wrong})

    def test_in_the_answer_and_the_metrics(self, agent: Agent) -> None:
        metrics = Metrics(Device(agent))
        rendering = TextRendering(Head("1", 0, "m", "f"), agent.engine.tokenizer, logprobs=False, tokens=False)

        def told(prompt: str, account: Account | None = None) -> dict[str, object]:
            account = account or written(agent, prompt)[1]
            metrics.note(account)
            described: dict[str, object] = rendering.whole([Portion("")], account)["choices"][0]["skerry"]
            return described

        own = next(entry for entry in agent.shelf.entries if entry.slot == OWN)
        assert told(HOME)["adapter"] == own.id
        bare = told(ELSEWHERE)
        assert bare["adapter"] is None
        assert "mix" not in bare
        account = written(agent, ELSEWHERE)[1]
        both = tuple(Used(entry.slot, entry.id, 0.5) for entry in agent.shelf.entries)
        mixed = told("", replace(account, adapters=both))
        assert mixed["adapter"] is None
        assert mixed["mix"] == [{"adapter": used.id, "weight": 0.5} for used in both]
        text = metrics.text().decode()
        assert 'skerry_adapted_total{slot="own"} 2.0' in text
        assert 'skerry_adapted_total{slot="fleet.0"} 1.0' in text
        assert 'skerry_adapted_total{slot="none"} 1.0' in text
        assert "skerry_adapters 2.0" in text
