"""The arms that are compared: what each is called, what it is swept over, and what a run of it leaves to be counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.eval.arms_learned import Centralised, Flat, FlatMean, Hierarchical, Local, Similar
from tools.eval.arms_memory import Memory
from tools.eval.arms_routers import Head, HeadOfU, Query, Uhlm
from tools.eval.fleets import Fleet, Pool, Rows
from tools.eval.play import Bools, Numbers, Policy, play

SHARES = tuple(round(0.05 * k, 2) for k in range(1, 20))
PRICES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
MEMORY_PRICES = (0.02, 0.1, 0.2, 0.3, 0.5, 0.7)  # fewer: each lookup is made by itself
ONCE = (0.0,)  # for arms without a knob

Chance = Callable[[Pool, Fleet, Rows, float], Numbers]  # (k,) with which the steps of some rows are asked, at a knob
Make = Callable[[Pool, Fleet, float], Policy]


@dataclass(frozen=True, slots=True)
class Arm:
    """`knob`: what `settings` are. One of `chance` and `make`: a fixed policy, or one that learns on the stream.
    `hindsight`: it is told what no device knows."""

    name: str
    title: str
    knob: str
    settings: tuple[float, ...]
    chance: Chance | None = None
    make: Make | None = None
    hindsight: bool = False


@dataclass(frozen=True, slots=True)
class Played:
    """One run of an arm on one fleet. Of its m fresh steps: `asked` (m,), the probability of an escalation to the LLM;
    audits at the rate `audit` among the others come on top. `right`, `agree` (m,): is what is written without the LLM
    right, and is it what the LLM would say; `memory` (m,): it came from memory. `stream`: counts of steps, escalations,
    audits, right and agreeing answers. `bytes`: of the whole run, stream and fresh steps, by what they were for.
    `by_round` (rounds, m): escalations of the fresh steps, had learning ended there; empty for a fixed policy."""

    asked: Numbers
    audit: float
    right: Bools
    agree: Bools
    memory: Bools
    stream: dict[str, int]
    bytes: dict[str, int]
    by_round: Bools

    @property
    def sent(self) -> Numbers:
        """(m,) The probability that the LLM answers, audits included."""
        return self.asked + (1.0 - self.asked) * self.audit * ~self.memory


def run(arm: Arm, steps: Pool, drawn: Fleet, setting: float, seed: int) -> Played:
    return (
        _learned(arm.make(steps, drawn, setting), steps, drawn, seed)
        if arm.make
        else _fixed(arm, steps, drawn, setting, seed)
    )


def _fixed(arm: Arm, steps: Pool, drawn: Fleet, setting: float, seed: int) -> Played:
    assert arm.chance is not None
    fresh, rows, rng = drawn.fresh, np.concatenate(drawn.stream), np.random.default_rng(seed)
    chance = arm.chance(steps, drawn, fresh, setting)
    asked, nothing = np.zeros(len(steps.kind), bool), np.zeros(len(steps.kind), bool)
    asked[rows] = rng.random(len(rows)) < arm.chance(steps, drawn, rows, setting)
    right, agree = steps.data.slm_right.copy(), ~steps.data.differs
    stream = _counts(steps, rows, asked, nothing, right, agree)
    asked[fresh] = rng.random(len(fresh)) < chance
    none = np.zeros(len(fresh), bool)
    return Played(chance, 0.0, right[fresh], agree[fresh], none, stream, _bytes(steps, asked, nothing), none[None][:0])


def _learned(policy: Policy, steps: Pool, drawn: Fleet, seed: int) -> Played:
    fresh, rows, rng = drawn.fresh, np.concatenate(drawn.stream), np.random.default_rng(seed)
    streamed = play(steps, drawn, policy, seed)
    asked, audits, written = streamed.asked, streamed.audits, streamed.written
    escalated = rng.permutation(fresh[streamed.fresh[-1]])
    written[escalated], _ = policy.resolve(escalated)
    right, agree = steps.data.slm_right.copy(), ~steps.data.differs
    known = np.flatnonzero(written >= 0)
    if len(known):
        right[known], agree[known] = policy.right(known, written[known]), policy.agree(known, written[known])
    asked[escalated] = written[escalated] < 0
    stream = _counts(steps, rows, asked, audits, right, agree)
    chance = asked[fresh].astype(float)
    audits[fresh] = ~asked[fresh] & (written[fresh] < 0) & (rng.random(len(fresh)) < policy.audit)
    costs = _bytes(steps, asked, audits, policy.peer_bytes, sum(policy.learning_bytes))
    memory = written[fresh] >= 0
    return Played(chance, policy.audit, right[fresh], agree[fresh], memory, stream, costs, streamed.fresh)


def _counts(steps: Pool, rows: Rows, asked: Bools, audits: Bools, right: Bools, agree: Bools) -> dict[str, int]:
    sent = (asked | audits)[rows]
    return {
        "steps": len(rows),
        "escalations": int(asked[rows].sum()),
        "audits": int(audits[rows].sum()),
        "right": int(np.where(sent, steps.data.llm_right[rows], right[rows]).sum()),
        "agree": int((sent | agree[rows]).sum()),
    }


def _bytes(steps: Pool, asked: Bools, audits: Bools, peers: int = 0, rounds: int = 0) -> dict[str, int]:
    """What audits cost is what the same run costs more with them."""
    up, down = steps.data.traffic(asked)
    all_up, all_down = steps.data.traffic(asked | audits)
    costs = {"uplink": up, "downlink": down, "audits": all_up + all_down - up - down}
    return {**costs, "peers": peers, "rounds": rounds}


def _top(worth: NDArray[np.float64], share: float) -> Numbers:
    """1 for the `share` of the steps that are worth most."""
    chance = np.zeros(len(worth))
    chance[np.argsort(-worth, kind="stable")[: round(share * len(worth))]] = 1.0
    return chance


def _static(steps: Pool, drawn: Fleet, rows: Rows, share: float) -> Numbers:
    """The threshold that sends this share of the fresh steps."""
    u = steps.data.u
    return (u[rows] > np.quantile(u[drawn.fresh], 1.0 - share)).astype(float)


def _per_device(steps: Pool, drawn: Fleet, rows: Rows, price: float) -> Numbers:
    """For each device, the threshold whose price on its fresh steps turned out lowest."""
    return _each(steps, drawn, rows, price, drawn.fresh)


def _per_device_stream(steps: Pool, drawn: Fleet, rows: Rows, price: float) -> Numbers:
    """The same on its stream: all that could be learned of a device's own threshold, if every answer were known."""
    return _each(steps, drawn, rows, price, np.concatenate(drawn.stream))


def _each(steps: Pool, drawn: Fleet, rows: Rows, price: float, known: Rows) -> Numbers:
    data = steps.data
    tau = np.zeros(drawn.devices)
    for device in range(drawn.devices):
        own = known[drawn.device[known] == device]
        own = own[np.argsort(-data.u[own], kind="stable")]
        gain = np.concatenate([[0.0], np.cumsum(data.beta[own] - price)])
        edges = np.flatnonzero(np.diff(data.u[own], prepend=2.0, append=-1.0))  # where a threshold can be
        best = int(edges[gain[edges].argmax()])
        tau[device] = data.u[own[best]] if best < len(own) else -1.0
    return (data.u[rows] > tau[drawn.device[rows]]).astype(float)


def _oracle(steps: Pool, drawn: Fleet, rows: Rows, share: float) -> Numbers:
    data = steps.data
    return _top(data.llm_right[rows].astype(float) - data.slm_right[rows] + 1e-3 * data.u[rows], share)


def _oracle_agreement(steps: Pool, drawn: Fleet, rows: Rows, share: float) -> Numbers:
    return _top(steps.data.differs[rows] + 1e-3 * steps.data.u[rows].astype(float), share)


def _constant(steps: Pool, drawn: Fleet, rows: Rows, rate: float) -> Numbers:
    return np.full(len(rows), rate)


def arms(steps: Pool) -> Iterator[Arm]:
    """Those that these steps allow for."""
    price, share = "price", "share"
    yield Arm("slm_only", "SLM only", share, (0.0,), _constant)
    yield Arm("llm_only", "LLM only", share, (1.0,), _constant)
    yield Arm("random", "random at equal rate", share, SHARES, _constant)
    yield Arm("static", "best static threshold", share, SHARES, _static, hindsight=True)
    yield Arm("local", "each device alone", price, PRICES, make=Local)
    yield Arm("federated", "federated, flat", price, PRICES, make=Flat)
    yield Arm("federated_mean", "federated, flat, weighted mean", price, PRICES, make=FlatMean)
    yield Arm("federated_clusters", "federated, clusters, personal", price, PRICES, make=Hierarchical)
    yield Arm("federated_similar", "federated, similar devices, personal", price, PRICES, make=Similar)
    yield Arm("centralised", "centralised", price, PRICES, make=Centralised)
    yield Arm("uhlm_averse", "U-HLM, risk-averse", "", ONCE, make=lambda s, d, _: Uhlm(s, d, averse=True))
    yield Arm("uhlm_prone", "U-HLM, risk-prone", "", ONCE, make=lambda s, d, _: Uhlm(s, d, averse=False))
    yield Arm("query_router", "query-level router", share, SHARES, make=Query)
    yield Arm("router_head", "router head, federated", price, PRICES, make=Head)
    yield Arm("router_head_u", "router head on u alone", price, PRICES, make=HeadOfU)
    if steps.views is not None:
        yield Arm("peer_memory", "peer memory, federated thresholds", price, MEMORY_PRICES, make=Memory)
    yield Arm(
        "per_device_stream", "best threshold per device, stream", price, PRICES, _per_device_stream, hindsight=True
    )
    yield Arm("per_device", "best threshold per device", price, PRICES, _per_device, hindsight=True)
    yield Arm("oracle", "oracle", share, SHARES, _oracle, hindsight=True)
    yield Arm("oracle_agreement", "oracle of agreement", share, SHARES, _oracle_agreement, hindsight=True)
