"""`skerry bench decode`: what the token loop costs, against llama.cpp alone and against llama-cpp-python.

All arms use the same file, prompt, threads and greedy decoding, and take turns within one run; each reports the median
of its rounds, measured from its first token to its last.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as llama
import numpy as np

from agent.agent import Account, Agent, Options, Piece, Request
from agent.agent import Event as AgentEvent
from agent.policy import ThresholdPolicy
from agent.uncertainty import Softmax
from models.engine.gguf import GgufEngine
from models.engine.threads import physical_cores
from models.sampling import shape
from protocol.resolve import Sampling

PROMPT = "Once upon a time, in a small village by the sea, there lived an old fisherman who"
_CONTEXT = 1024
_GREEDY = Sampling()
# The second is what create_completion does if nothing else is asked for.
_SAMPLINGS = {"greedy": _GREEDY, "sampled": Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)}
_KV = llama.GGML_TYPE_Q8_0  # the agent's default, in every arm
_FEW = 3  # rounds of the arms that are far apart
_NEVER = ThresholdPolicy(1.0)

Arm = Callable[[], float]


def measure(model: Path, *, tokens: int, rounds: int, busy: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of every arm and the ratios between them."""
    threads = physical_cores()
    agent = open_agent(model, threads)
    try:
        with _bare(model, threads) as bare, _high_level(model, n_threads=threads) as high_level:
            arms: dict[str, Arm] = {
                "raw": partial(bare, tokens),
                "skerry": partial(agent_rate, agent, tokens),
                "llama_cpp_python": partial(high_level, tokens, temperature=0.0),
            }
            rates = take_turns(arms, rounds, progress)
        variants = _variants(agent, model, threads, tokens, progress)
        shares = {name: overhead_share(agent, sampling, tokens) for name, sampling in _SAMPLINGS.items()}
        result = {
            "ratio_raw": _ratio(rates, "skerry", "raw"),
            "ratio_llama_cpp_python": _ratio(rates, "skerry", "llama_cpp_python"),
            **{f"ratio_{name}": _ratio(variants, "skerry_sampled", name) for name in variants if "llama" in name},
            "overhead_share": round(shares["greedy"], 4),
            "overhead_share_sampled": round(shares["sampled"], 4),
            **{f"{name}_tok_s": round(median(values), 2) for name, values in (rates | variants).items()},
            "vocab": agent.engine.info.vocab,
            "threads": threads,
            "tokens": tokens,
            "rounds": rounds,
        }
        if busy:
            result |= measure_busy(agent, model, tokens=tokens, rounds=rounds, busy=busy, progress=progress)
    finally:
        agent.close()
    return result


def _variants(
    agent: Agent, model: Path, threads: int, tokens: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """create_completion in other ways, against the agent drawing alike: with its default sampling; as it comes, which
    also means its default thread count; and with log-probabilities, without which nobody knows how sure it is."""
    with (
        _high_level(model, n_threads=threads) as sampled,
        _high_level(model) as as_it_comes,
        _high_level(model, n_threads=threads, logits_all=True) as with_logits,
    ):
        arms: dict[str, Arm] = {
            "skerry_sampled": partial(agent_rate, agent, tokens, _SAMPLINGS["sampled"]),
            "llama_cpp_python_sampled": partial(sampled, tokens),
            "llama_cpp_python_defaults": partial(as_it_comes, tokens),
            "llama_cpp_python_logprobs": partial(with_logits, tokens, logprobs=1),
        }
        return take_turns(arms, _FEW, progress)


def measure_busy(
    agent: Agent, model: Path, *, tokens: int, rounds: int, busy: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The agent beside `busy` processes that burn a core each, against one thread with the machine to itself.

    The agent's figure includes the time that its governor takes to find out.
    """
    single = open_agent(model, 1)
    try:
        alone = take_turns({"one thread alone": lambda: agent_rate(single, tokens)}, rounds, progress)
    finally:
        single.close()
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        beside = take_turns({"skerry, busy": lambda: agent_rate(agent, tokens)}, rounds, progress, warm_up=False)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    one, many = median(alone["one thread alone"]), median(beside["skerry, busy"])
    return {
        "ratio_busy_one_thread": round(many / one, 3),
        "one_thread_tok_s": round(one, 2),
        "busy_tok_s": round(many, 2),
        "busy_slowest_round_tok_s": round(min(beside["skerry, busy"]), 2),
        "busy": busy,
    }


def take_turns(
    arms: dict[str, Arm], rounds: int, progress: Callable[[str], None], *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Every arm once per round, in an order that rotates, so that drift of the machine hits all alike."""
    names = list(arms)
    if warm_up:
        for name in names:
            arms[name]()
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rates[name].append(arms[name]())
            progress(f"round {turn + 1}/{rounds}: {name} {rates[name][-1]:.1f} tok/s")
    return rates


def _ratio(rates: dict[str, list[float]], arm: str, base: str) -> float:
    """Median of the rounds' ratios."""
    return round(median(a / b for a, b in zip(rates[arm], rates[base], strict=True)), 3)


def open_agent(model: Path, threads: int) -> Agent:
    engine = GgufEngine(model, context=_CONTEXT, sequences=1, threads=threads, hidden=False)
    return Agent(engine, Options(policy=_NEVER))


def agent_rate(agent: Agent, tokens: int, sampling: Sampling = _GREEDY) -> float:
    """Tokens per second of one answer, as a listener sees them come."""
    times: list[float] = []
    done = Event()

    def listen(event: AgentEvent) -> None:
        if isinstance(event, Piece):
            times.append(time.perf_counter())
        if isinstance(event, Account | Exception):
            done.set()

    agent.submit(Request(PROMPT, max_tokens=tokens, sampling=sampling), listen)
    done.wait()
    return (len(times) - 1) / (times[-1] - times[0])


def overhead_share(agent: Agent, sampling: Sampling, tokens: int) -> float:
    """Share of a step that uncertainty and sampling take, measured between real forward passes."""
    engine, softmax = agent.engine, Softmax(agent.engine.info.vocab)
    place = engine.open(agent.encode(PROMPT), tokens)
    ids: list[int] = []
    feed, spent, began = place.align(agent.encode(PROMPT)), 0.0, 0.0
    for position in range(tokens):
        (step,) = engine.forward([(place, feed)])
        before = time.perf_counter()
        began = began or before
        belief = softmax.load(step.logits)
        draft = shape(step.logits, sampling, ids, belief.likeliest).draw_at(sampling.seed, position)
        belief.uncertainty("entropy", draft, 0, position)
        spent += time.perf_counter() - before
        feed = [draft]
    place.close()
    return spent / (time.perf_counter() - began)


@contextmanager
def _bare(model: Path, threads: int) -> Iterator[Callable[[int], float]]:
    """A greedy loop of nothing but llama_decode and argmax, on a context of its own."""
    weights = llama.llama_model_load_from_file(str(model).encode(), _model_params())
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = _CONTEXT, threads, threads
    params.type_k = params.type_v = _KV
    context = llama.llama_init_from_model(weights, params)
    vocab = llama.llama_model_get_vocab(weights)
    size = llama.llama_vocab_n_tokens(vocab)
    raw = PROMPT.encode()
    prompt = (llama.llama_token * 256)()
    count = llama.llama_tokenize(vocab, raw, len(raw), prompt, 256, True, False)
    token = (llama.llama_token * 1)()

    def run(tokens: int) -> float:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        llama.llama_decode(context, llama.llama_batch_get_one(prompt, count))
        began = time.perf_counter()
        for _ in range(tokens - 1):
            logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (size,))
            token[0] = int(logits.argmax())
            llama.llama_decode(context, llama.llama_batch_get_one(token, 1))
        return (tokens - 1) / (time.perf_counter() - began)

    try:
        yield run
    finally:
        llama.llama_free(context)
        llama.llama_model_free(weights)


@contextmanager
def _high_level(model: Path, **settings: Any) -> Iterator[Callable[..., float]]:
    """llama-cpp-python's `create_completion`; its prefill is taken off by a second, one-token call."""
    default = llama.llama_model_default_params
    llama.llama_model_default_params = _model_params
    try:
        high = llama_cpp.Llama(
            str(model), n_ctx=_CONTEXT, verbose=False, type_k=_KV, type_v=_KV, flash_attn=True, **settings
        )
    finally:
        llama.llama_model_default_params = default

    def once(tokens: int, options: dict[str, Any]) -> tuple[float, int]:
        began = time.perf_counter()
        made = high.create_completion(PROMPT, max_tokens=tokens, **options)
        return time.perf_counter() - began, made["usage"]["completion_tokens"]

    def run(tokens: int, **options: Any) -> float:
        once(1, options)  # the prompt is in the cache now
        (short, _), (long, count) = once(1, options), once(tokens, options)
        return (count - 1) / (long - short)

    yield run
    high.close()


_defaults = llama.llama_model_default_params


def _model_params() -> Any:
    """As the agent loads its model: weights as they are in the file, not rearranged for the CPU."""
    params = _defaults()
    params.use_extra_bufts = False
    return params
