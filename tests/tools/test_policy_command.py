"""`skerry policy` on a ledger that a device wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.learn.goals import Price
from agent.learn.learner import Learner
from agent.learn.ledger import Ledger
from agent.policy import ThresholdPolicy
from protocol.errors import ConfigError, StoreError
from protocol.rounds import Learned, Level
from tests.agent.learn.test_learner import live
from tools.cli import skerry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKERRY_DEVICE_FOLDER", str(tmp_path))
    return tmp_path


def learner_in(folder: Path) -> Learner:
    return Learner(Ledger(folder / "ledger.db"), ThresholdPolicy(0.25, 0.02), Price(0.3), "entropy", "model")


@pytest.fixture
def learned(folder: Path) -> Path:
    learner = learner_in(folder)
    live(learner, 3000, 0)
    learner.heed({learner.subject: Learned(Level(0.4, 1000.0, 17))})
    learner.close()
    return folder


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(skerry, ["policy", *arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


def test_show_says_what_is_aimed_at_and_what_it_rests_on(learned: Path) -> None:
    facts = json.loads(run("show", "--json").output)
    assert facts["goal"] == {"kind": "price", "price": 0.3}
    assert 0.2 < facts["threshold"] < 0.4
    assert facts["cluster"] == {"threshold": 0.4, "devices": 17}
    assert facts["steps"] <= 3000
    assert facts["audits"] > 5
    assert facts["differs"] < facts["differs_at_most"] < 0.2
    shown = run("show").output
    assert "price 0.3" in shown
    assert "cluster 0.4 of 17 devices" in shown


def test_show_works_while_the_device_writes(folder: Path) -> None:
    learner = learner_in(folder)
    live(learner, 1000, 0)
    learner.refresh()
    learner.ledger.flush()
    assert json.loads(run("show", "--json").output)["answered"] > 500
    learner.close()


def test_set_is_followed_by_the_running_device_until_it_is_taken_back(folder: Path) -> None:
    learner = learner_in(folder)
    live(learner, 3000, 0)
    assert "share 0.05" in run("set", "--share", "0.05").output
    learner.refresh()
    assert learner.policy.threshold > 0.9
    facts = json.loads(run("show", "--json").output)
    assert facts["goal"] == {"kind": "share", "share": 0.05}
    assert facts["followed"]
    run("set", "--bound", "0.1", "--confidence", "0.9")
    learner.refresh()
    assert learner.goal.name.startswith("bound")
    run("set", "--threshold", "0.7")
    learner.refresh()
    assert learner.policy.threshold == 0.7
    assert "price 0.3" in run("set", "--default").output
    learner.refresh()
    assert learner.goal == Price(0.3)
    learner.close()


def test_show_says_if_a_goal_is_not_followed_yet(learned: Path) -> None:
    assert "still that of the goal before" not in run("show").output
    run("set", "--threshold", "0.9")
    assert not json.loads(run("show", "--json").output)["followed"]
    assert "still that of the goal before" in run("show").output


def test_who_asks_everything_keeps_nothing_that_differs(folder: Path) -> None:
    run("set", "--bound", "0.01")
    learner = learner_in(folder)
    live(learner, 200, 0)
    learner.close()
    facts = json.loads(run("show", "--json").output)
    assert (facts["threshold"], facts["asked"], facts["differs"], facts["differs_at_most"]) == (0.0, 1.0, 0.0, 0.0)


def test_set_works_before_a_device_ever_ran(folder: Path) -> None:
    run("set", "--price", "0.5")
    learner = learner_in(folder)
    assert learner.goal == Price(0.5)
    learner.close()


@pytest.mark.parametrize("arguments", [[], ["--price", "0.2", "--share", "0.1"], ["--price", "1.5"], ["--share", "x"]])
def test_set_takes_one_goal(folder: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(skerry, ["policy", "set", *arguments])
    assert result.exit_code == 2
    assert not (folder / "ledger.db").exists()


def test_explain_shows_beta_by_uncertainty_and_what_other_goals_would_choose(learned: Path) -> None:
    found = json.loads(run("explain", "--json").output)
    betas = [one["beta"] for one in found["bins"] if one["rows"] > 20]
    assert betas == sorted(betas), "the LLM rejects with probability u here"
    assert found["choices"][0]["by"] == "in force"
    by = {choice["by"]: choice for choice in found["choices"]}
    assert by["price price=0.1"]["threshold"] < by["price price=0.4"]["threshold"]
    assert "in force" in run("explain").output


def test_without_a_ledger_it_says_how_one_begins(folder: Path) -> None:
    for command in ("show", "explain"):
        with pytest.raises(StoreError, match="no ledger yet"):
            run(command)


def test_a_wrong_configuration_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKERRY_POLICY_GOAL", "fame")
    with pytest.raises(ConfigError, match="goal"):
        run("show")
