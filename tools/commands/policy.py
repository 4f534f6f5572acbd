"""`skerry policy`: when the device asks for help, why, and what it is to aim for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from agent.config import AgentConfig, device_folder
from agent.config import goal as configured
from agent.learn import goals
from agent.learn.explain import CONFIDENCE, Explanation, choice
from agent.learn.explain import explain as explanation
from agent.learn.federation import PAST, past_of
from agent.learn.goals import Bound, Fixed, Goal, Price, Share
from agent.learn.learner import GOAL, STATE, goal_of, state_of
from agent.learn.ledger_store import LedgerReader, LedgerValues
from agent.learn.sample import Histogram, Sample
from protocol.rounds import Level
from tools.settings import configuration

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
of_config = click.option("--config", type=click.Path(path_type=Path), help="The agent's configuration file.")

_FRACTION = click.FloatRange(0.0, 1.0, min_open=True, max_open=True)


@click.group(epilog="Example: skerry policy show")
def policy() -> None:
    """When the device asks for help: look at it, explain it, and say what it is to aim for."""


@policy.command(epilog="Example: skerry policy show --json")
@of_config
@as_json
def show(config: Path | None, as_json: bool) -> None:
    """Show goal and threshold, and what they rest on. The agent may be running."""
    settings = _settings(config)
    facts = _facts(settings)
    click.echo(json.dumps(facts) if as_json else "\n".join(_told(facts)))


@policy.command("set", epilog="Example: skerry policy set --share 0.05")
@click.option("--price", type=_FRACTION, help="Ask when the LLM would reject the draft at least so probably.")
@click.option("--share", type=_FRACTION, help="The cloud is asked for this share of the tokens, audits included.")
@click.option("--bound", type=_FRACTION, help="At most this share of the tokens is kept that the LLM would change.")
@click.option("--confidence", type=_FRACTION, default=0.95, show_default=True, help="With which the bound is to hold.")
@click.option("--threshold", type=click.FloatRange(0.0, 1.0), help="Ask when u is above it; nothing is learned.")
@click.option("--default", "default", is_flag=True, help="Aim for what the configuration says again.")
@of_config
def set_goal(
    price: float | None,
    share: float | None,
    bound: float | None,
    confidence: float,
    threshold: float | None,
    default: bool,
    config: Path | None,
) -> None:
    """Set what the device aims for. A running agent follows within ten seconds; the setting survives restarts and
    goes before the configuration.

    \b
    Examples:
      skerry policy set --price 0.3
      skerry policy set --bound 0.02 --confidence 0.9
      skerry policy set --default
    """
    chosen: list[Goal | None] = [None] if default else []
    chosen += [Price(price)] if price is not None else []
    chosen += [Share(share)] if share is not None else []
    chosen += [Bound(bound, confidence)] if bound is not None else []
    chosen += [Fixed(threshold)] if threshold is not None else []
    if len(chosen) != 1:
        raise click.UsageError("give one of --price, --share, --bound, --threshold and --default")
    settings = _settings(config)
    goal = chosen[0]
    with closing(LedgerValues(_ledger(settings))) as values:
        values.put(GOAL, json.dumps(goals.plain(goal)).encode() if goal else b"")
    click.echo(f"goal: {_words(goal or configured(settings.policy))}")


@policy.command(epilog="Example: skerry policy explain")
@of_config
@as_json
def explain(config: Path | None, as_json: bool) -> None:
    """Explain the threshold: what the LLM said at which u, and what other goals would choose."""
    settings = _settings(config)
    sample, seen, get = _read(settings)
    state, goal = state_of(get), goal_of(get, configured(settings.policy))
    threshold = state.threshold if state else settings.policy.threshold
    found = explanation(goal, sample, seen, threshold, settings.policy.audit)
    click.echo(json.dumps(asdict(found)) if as_json else "\n".join(_tables(found)))


def _settings(config: Path | None) -> AgentConfig:
    return configuration(AgentConfig, "agent", config, os.environ)


def _ledger(settings: AgentConfig) -> Path:
    return device_folder(settings) / "ledger.db"


def _read(settings: AgentConfig) -> tuple[Sample, Histogram, Callable[[str], bytes | None]]:
    with closing(LedgerReader(_ledger(settings))) as ledger:
        kept = {name: ledger.get(name) for name in (GOAL, STATE, PAST)}
        return ledger.sample(), ledger.seen(), kept.get


def _facts(settings: AgentConfig) -> dict[str, Any]:
    sample, seen, get = _read(settings)
    state, goal, past = state_of(get), goal_of(get, configured(settings.policy)), past_of(get)
    threshold = state.threshold if state else settings.policy.threshold
    agreed = state.agreed if state else None
    found = choice("in force", threshold, sample, seen, settings.policy.audit)
    return {
        "goal": goals.plain(goal),
        "followed": state is None or state.goal == goals.plain(goal),
        "threshold": round(threshold, 4),
        "own": round(state.own, 4) if state else None,
        "evidence": round(state.evidence, 1) if state and state.evidence is not None else None,
        "cluster": _level(agreed.cluster if agreed else None),
        "fleet": _level(agreed.overall.level if agreed and agreed.overall else None),
        "steps": sample.steps,
        "answered": len(sample),
        "audits": int((sample.propensity < 1.0).sum()),
        "asked": round(found.sent, 4),
        "differs": round(found.disagreement, 4),
        "differs_at_most": round(found.bound, 4),
        "round": past.answered,
        "number": past.number,
        "noise": settings.rounds.noise,
        "epsilon": round(past.spent(settings.rounds.noise, settings.rounds.delta), 3)
        if settings.rounds.noise
        else None,
    }


def _level(level: Level | None) -> dict[str, float] | None:
    return {"threshold": round(level.threshold, 4), "devices": level.devices} if level else None


def _told(facts: dict[str, Any]) -> Iterator[str]:
    yield f"goal        {_words(goals.parse(facts['goal']))}"
    parts = []
    if facts["evidence"] is not None:
        parts.append(f"by itself {facts['own']:g}, from {facts['evidence']:g} steps near it")
    parts += [
        f"{who} {facts[who]['threshold']:g} of {facts[who]['devices']} devices"
        for who in ("cluster", "fleet")
        if facts[who]
    ]
    yield f"threshold   {facts['threshold']:g}" + (f"   ({'; '.join(parts)})" if parts else "")
    if not facts["followed"]:
        yield "            still that of the goal before: the agent follows within ten seconds while it runs"
    yield f"ledger      {facts['answered']} answers of the LLM ({facts['audits']} to audits) in {facts['steps']} steps"
    yield f"asked       {facts['asked']:.1%} of the tokens, audits included, by what was seen so far"
    yield (
        f"differs     {facts['differs']:.1%} of all tokens are kept although the LLM would write another one; "
        f"at most {facts['differs_at_most']:.1%} with {CONFIDENCE:.0%} confidence"
    )
    if facts["number"]:
        yield f"rounds      took part in round {facts['round']}; number {facts['number']} is agreed"
    if facts["epsilon"] is not None:
        yield f"privacy     noise of {facts['noise']:g} clips, epsilon {facts['epsilon']:g} spent"


def _words(goal: Goal) -> str:
    match goal:
        case Price(price):
            return f"price {price:g}: ask where the LLM would reject the draft with a probability above it"
        case Share(share):
            return f"share {share:g}: ask for that share of the tokens, audits included"
        case Bound(bound, confidence):
            return f"bound {bound:g}: keep at most that share of tokens which the LLM would change ({confidence:.0%})"
        case Fixed(threshold):
            return f"fixed: ask when u is above {threshold:g}"


def _tables(found: Explanation) -> Iterator[str]:
    yield f"{'u':>13} {'steps':>7} {'answers':>8} {'beta':>6} {'differs':>8}"
    for one in found.bins:
        if one.share or one.rows:
            beta, differs = ("-" if x is None else f"{x:.2f}" for x in (one.beta, one.differs))
            yield f"{one.low:.3f} - {one.high:.3f} {one.share:7.1%} {one.rows:8} {beta:>6} {differs:>8}"
    yield ""
    yield f"{'by':<28} {'threshold':>9} {'asked':>7} {'differs':>8} {'at most':>8}"
    for by in found.choices:
        yield f"{by.by:<28} {by.threshold:9.3f} {by.sent:7.1%} {by.disagreement:8.2%} {by.bound:8.2%}"
