"""`skerry edge status, rollback, resume, round`: with the edge running, and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from protocol.errors import RequestError, StoreError, StoreInUse
from protocol.rounds import encode
from protocol.topics import UPDATE
from server.edge.config import EdgeConfig, Place, RoundsSection, assemble
from tests.agent.peers.devices import eventually
from tests.server.edge.round_fleet import HOME, SUBJECT, Fleet, update
from tools.commands.edge import edge


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """An edge that has agreed on 0.2 and then on 0.9, and waits."""
    with Fleet(tmp_path / "kept") as fleet:
        fleet.edge(devices=1)
        device = fleet.device("d", threshold=0.2)
        fleet.agreed(1)
        device.threshold = 0.9
        fleet.order("round")
        fleet.agreed(2)
        yield fleet


def skerry_edge(fleet: Fleet, *arguments: str) -> str:
    done = CliRunner().invoke(edge, arguments, env={"SKERRY_EDGE_FOLDER": str(fleet.folder)}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def status(fleet: Fleet) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(skerry_edge(fleet, "status", "--json"))
    return found


def test_status_shows_rounds_versions_devices_and_history(fleet: Fleet) -> None:
    fleet.devices[0].say(update(2, threshold=7.0))
    eventually(lambda: status(fleet)["refusals"] == {"out_of_range": 1})
    found = status(fleet)
    assert (found["number"], found["round"], found["collecting"], found["held"]) == (2, 2, False, False)
    assert found["devices"] == {"known": 1, "lately": 1, "waiting": 0}
    assert found["subjects"] == [{"subject": SUBJECT, "threshold": 0.9, "evidence": 10.0, "devices": 1, "round": 2}]
    assert found["refused"] == {"d": {"out_of_range": 1}}
    assert [(entry["number"], entry["why"]) for entry in found["history"]] == [(2, "round"), (1, "round")]
    text = skerry_edge(fleet, "status")
    assert SUBJECT in text
    assert "1 out_of_range" in text
    assert f"process {found['process']}" in text


def test_privacy_shows_what_the_devices_have_spent(fleet: Fleet) -> None:
    plain = json.loads(skerry_edge(fleet, "privacy", "--json"))
    assert (plain["devices"], plain["without_noise"], plain["worst_epsilon"]) == (1, 1, None)
    for device, rounds in (("blurred", 1), ("worn", 2)):
        for number in range(1, 1 + rounds):
            fleet.devices[0].transport.publish(
                HOME.path(UPDATE, device), encode(update(number, clip=0.1, noise=4.0, evidence=1.0)), qos=1
            )
    eventually(lambda: json.loads(skerry_edge(fleet, "privacy", "--json"))["devices"] == 3)
    found = json.loads(skerry_edge(fleet, "privacy", "--json"))
    assert found["without_noise"] == 1
    assert 1.9 < found["epsilon"]["50%"] < 3.0, "two updates with noise 4"
    assert "1 of them" in skerry_edge(fleet, "privacy")


def test_a_running_edge_rolls_back_and_holds(fleet: Fleet) -> None:
    assert "number 1 is published again" in skerry_edge(fleet, "rollback", "--hold")
    assert fleet.agreed(3).subjects == fleet.agreed(1).subjects
    assert status(fleet)["held"]
    with pytest.raises(RequestError, match="skerry edge resume"):
        skerry_edge(fleet, "round")
    assert skerry_edge(fleet, "resume") == "rounds go on\n"
    assert skerry_edge(fleet, "round") == "a round begins\n"
    assert fleet.level(fleet.agreed(4)).threshold == 0.9
    skerry_edge(fleet, "rollback", "--to", "2")
    fleet.agreed(5)
    skerry_edge(fleet, "rollback")  # to what was agreed before number 2
    assert fleet.level(fleet.agreed(6)).threshold == 0.2
    assert "rollback, was 1" in skerry_edge(fleet, "status")


def test_without_an_edge_orders_wait_for_it(fleet: Fleet) -> None:
    fleet.end()
    assert "as soon as the edge runs" in skerry_edge(fleet, "rollback", "--hold")
    found = status(fleet)
    assert found["process"] is None
    assert found["orders"] == ["hold", "rollback"]
    assert "waiting to be done: hold, rollback" in skerry_edge(fleet, "status")
    fleet.edge(devices=1)
    assert fleet.level(fleet.agreed(3)).threshold == 0.2
    assert status(fleet)["held"]


def test_mistakes_are_told(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="number 9 is not in the history, which has 2, 1"):
        skerry_edge(fleet, "rollback", "--to", "9")
    skerry_edge(fleet, "rollback")
    with pytest.raises(RequestError, match="name one with --to"):
        skerry_edge(fleet, "rollback")
    for command in ("status", "rollback", "round", "resume"):
        with pytest.raises(StoreError, match="no edge has kept rounds"):
            CliRunner().invoke(
                edge, [command], env={"SKERRY_EDGE_FOLDER": str(tmp_path / "none")}, catch_exceptions=False
            )
        assert "Example" in CliRunner().invoke(edge, [command, "--help"]).output


def test_two_edges_do_not_share_a_folder(fleet: Fleet) -> None:
    with pytest.raises(StoreInUse, match=r"edge\.folder"):
        assemble(EdgeConfig(Place(folder=str(fleet.folder))))
    assert assemble(EdgeConfig(Place(folder=str(fleet.folder)), rounds=RoundsSection(enabled=False))).rounds is None
