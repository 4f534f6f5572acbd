"""A device in a secure round: it does not help an edge that asks for more than the sum of a real cohort."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from agent.learn.secure import Participant
from protocol.secure import (
    Cohort,
    Consent,
    Masked,
    Member,
    Message,
    Proof,
    Relay,
    Reveal,
    Roll,
    Setting,
    Shares,
    Survivors,
)
from protocol.sums import contribution
from server.edge.secure import SecureOptions
from tests.server.edge.secure_fleet import LATER, PLACE, SUBJECT, Chance, Fleet, someone

OPTIONS = SecureOptions(least=4, most=8, patience=5.0)
COUNT = 8  # so the threshold is 6


def fleet_at(kind: type) -> tuple[Fleet, dict[str, Message]]:
    """The fleet, and what its edge is about to tell each device, all of this kind."""
    fleet = Fleet(COUNT, OPTIONS)
    return fleet, dict(fleet.upto(kind))


def refuses(fleet: Fleet, name: str, message: Message, reason: str) -> None:
    """And goes on with what it should have been told."""
    device = fleet.devices[name]
    before = device.refused[reason]
    assert device.heard(message, fleet.now) == []
    assert device.refused[reason] > before


def member(name: str, identity: str | None = None, round: int = 7) -> Member:
    """A genuine one, unless anything is given."""
    sealing, masking = (X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2))
    text = Setting(PLACE, round, SUBJECT).member(name, sealing, masking, bytes(32))
    return Member(name, sealing, masking, bytes(32), someone(identity or name).sign(text))


Change = Callable[[list[Member]], list[Member]]


class TestRolls:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda members: members[:3], "too_few"),
            (lambda members: members[1:], "false_roll"),
            (lambda members: members[::-1], "false_roll"),
            (lambda members: [*members, members[-1]], "false_roll"),
            (lambda members: [member("d00"), *members[1:]], "false_roll"),
            (lambda members: [*members, member("stranger")], "unknown"),
            (lambda members: [*members[:-1], member("d07", "d06")], "bad_signature"),
            (lambda members: [*members[:-1], member("d07", round=6)], "bad_signature"),
            (lambda members: [*members[:-1], replace(members[-1], sealing=members[-2].sealing)], "bad_signature"),
            (lambda members: [*members, member("twin", "d07")], "false_roll"),
        ],
        ids=[
            "small",
            "without me",
            "disorder",
            "twice",
            "false me",
            "made up",
            "forged",
            "replayed",
            "mixed",
            "two names",
        ],
    )
    def test_false_ones(self, change: Change, reason: str) -> None:
        fleet, told = fleet_at(Roll)
        fleet.known["twin"] = fleet.known["d07"]
        roll = told["d00"]
        assert isinstance(roll, Roll)
        refuses(fleet, "d00", replace(roll, members=change(roll.members)), reason)
        fleet.deliver(told.items())
        fleet.run()
        assert fleet.edge.results[0].total == fleet.expected(fleet.names)

    @pytest.mark.parametrize("change", [{"round": 8}, {"subject": "ff" * 8}])
    def test_of_another_round_or_subject(self, change: dict[str, int | str]) -> None:
        fleet, told = fleet_at(Roll)
        refuses(fleet, "d00", replace(told["d00"], **change), "other_round")

    def test_a_second_one(self) -> None:
        """A device that answered two would mask one value in two ways."""
        fleet, told = fleet_at(Roll)
        roll = told["d00"]
        assert isinstance(roll, Roll)
        fleet.deliver(told.items())
        refuses(fleet, "d00", roll, "out_of_step")
        refuses(fleet, "d00", replace(roll, members=roll.members[:7]), "out_of_step")

    def test_weak_keys(self) -> None:
        fleet, told = fleet_at(Roll)
        roll = told["d00"]
        assert isinstance(roll, Roll)
        key = member("d07").sealing
        text = Setting(PLACE, 7, SUBJECT).member("d07", bytes(32), key, bytes(32))
        weak = Member("d07", bytes(32), key, bytes(32), someone("d07").sign(text))
        refuses(fleet, "d00", replace(roll, members=[*roll.members[:-1], weak]), "weak_key")

    def test_different_ones_for_different_members(self) -> None:
        """Half of the members are told of a cohort in which another device's keys are others (an old Join of its): no
        box of the one half opens in the other."""
        fleet, told = fleet_at(Roll)
        roll = told["d00"]
        assert isinstance(roll, Roll)
        other = replace(roll, members=[*roll.members[:-1], member("d07")])
        cohorts = [Cohort(Setting(PLACE, 7, SUBJECT), each.members) for each in (roll, other)]
        boxes: list[list[bytes | None]] = []
        for number, name in enumerate(fleet.names[:7]):
            (shares,) = fleet.devices[name].heard(roll if number % 2 else other, fleet.now)
            assert isinstance(shares, Shares)
            boxes.append(shares.boxes)
        relay = Relay(cohorts[1].id, list(range(7)), [each[0] for each in boxes] + [None])
        refuses(fleet, "d00", relay, "too_few")
        assert fleet.devices["d00"].refused["bad_box"] == 3


class TestRelays:
    def test_too_few_boxes_that_open(self) -> None:
        fleet, told = fleet_at(Relay)
        relay = told["d00"]
        assert isinstance(relay, Relay)
        for boxes in ([None] * COUNT, [relay.boxes[1]] * COUNT, [bytes(50)] * COUNT, relay.boxes[::-1]):
            refuses(fleet, "d00", replace(relay, boxes=boxes), "too_few")
        refuses(fleet, "d00", replace(relay, dealers=[0, 1, 2, 3, 4]), "too_few")

    @pytest.mark.parametrize(
        "change", [{"dealers": [1, 2, 3]}, {"dealers": [0, 0, 1]}, {"dealers": [0, 1, 8]}, {"boxes": [None] * 7}]
    )
    def test_malformed_ones(self, change: dict[str, list[int]]) -> None:
        fleet, told = fleet_at(Relay)
        refuses(fleet, "d00", replace(told["d00"], **change), "malformed")

    def test_a_second_one_with_other_dealers(self) -> None:
        """Two masked values of one device would differ by a mask that the edge may learn."""
        fleet, told = fleet_at(Relay)
        relay = told["d00"]
        assert isinstance(relay, Relay)
        fleet.deliver(told.items())
        refuses(fleet, "d00", replace(relay, dealers=relay.dealers[:6]), "out_of_step")

    def test_of_another_cohort(self) -> None:
        fleet, told = fleet_at(Relay)
        refuses(fleet, "d00", replace(told["d00"], cohort=bytes(32)), "other_cohort")


class TestReveals:
    @pytest.mark.parametrize(
        ("who", "reason"),
        [
            ([0, 1, 2, 3, 4], "too_few"),
            ([1, 2, 3, 4, 5, 6], "false_survivors"),
            ([0, 1, 2, 3, 4, 5, 5], "malformed"),
            ([0, 1, 2, 3, 4, 5, 8], "malformed"),
        ],
    )
    def test_false_survivors(self, who: list[int], reason: str) -> None:
        fleet, told = fleet_at(Survivors)
        refuses(fleet, "d00", replace(told["d00"], who=who), reason)

    def test_survivors_that_dealt_nothing(self) -> None:
        fleet = Fleet(COUNT, OPTIONS)
        fleet.deliver(fleet.upto(Roll), {"d07": Shares})
        fleet.wait()
        fleet.deliver(fleet.told_next())
        told = dict(fleet.told_next())
        refuses(fleet, "d00", replace(told["d00"], who=list(range(8))), "false_survivors")

    def test_an_edge_that_asks_for_both_kinds_of_shares(self) -> None:
        """It says to one half that d07 is lost and to the other that it is not. Neither list gets enough consents, so
        nobody reveals anything, whatever it proves."""
        fleet, told = fleet_at(Survivors)
        lists = {name: list(range(COUNT - number % 2)) for number, name in enumerate(fleet.names[:7])}
        signatures: dict[str, bytes] = {}
        for name, who in lists.items():
            (consent,) = fleet.devices[name].heard(replace(told[name], who=who), fleet.now)
            assert isinstance(consent, Consent)
            signatures[name] = consent.signature
            refuses(fleet, name, replace(told[name], who=list(range(7))), "out_of_step")  # a second list
        id = told["d00"].cohort  # type: ignore[union-attr]
        for name, who in lists.items():
            same = [signatures[other] if lists.get(other) == who else None for other in fleet.names]
            attempts: list[list[bytes | None]] = [same, [*signatures.values(), None], [signatures[name]] * COUNT, []]
            for proof in attempts:
                refuses(fleet, name, Proof(id, proof), "no_proof")

    def test_shares_are_revealed_once(self) -> None:
        fleet, told = fleet_at(Proof)
        (reveal,) = fleet.devices["d00"].heard(told["d00"], fleet.now)
        assert isinstance(reveal, Reveal)
        refuses(fleet, "d00", told["d00"], "no_round")


class TestSessions:
    def test_no_round_or_one_that_is_over(self) -> None:
        fleet, told = fleet_at(Relay)
        device = fleet.devices["d00"]
        assert device.heard(told["d00"], 2 * LATER + 1) == []
        refuses(fleet, "d00", told["d00"], "no_round")

    def test_steps_out_of_order(self) -> None:
        fleet, told = fleet_at(Roll)
        roll = told["d00"]
        assert isinstance(roll, Roll)
        id = Cohort(Setting(PLACE, 7, SUBJECT), roll.members).id
        early: list[Message] = [
            Relay(id, list(range(8)), [None] * 8),
            Survivors(id, list(range(8))),
            Proof(id, [bytes(64)] * 8),
        ]
        for message in early:
            refuses(fleet, "d00", message, "out_of_step")
        fleet.deliver(told.items())
        for message in early[1:]:
            refuses(fleet, "d00", message, "out_of_step")
        none: list[bytes | None] = [None] * 8
        of_devices: list[Message] = [
            Shares(id, none),
            Masked(id, bytes(48)),
            Consent(id, bytes(64)),
            Reveal(id, none),
        ]
        for foreign in of_devices:
            refuses(fleet, "d00", foreign, "out_of_step")

    def test_an_old_round_can_not_be_replayed_into_a_new_one(self) -> None:
        fleet, told = fleet_at(Relay)
        fleet.devices["d00"].join(8, SUBJECT, contribution(0.5, 1.0, None), 2 * LATER)
        refuses(fleet, "d00", told["d00"], "out_of_step")
        refuses(fleet, "d00", fleet.told[0][1], "other_round")

    def test_keys_are_new_in_each_round(self) -> None:
        device = Participant(PLACE, "d00", someone("d00"), lambda name: None, Chance("x"))
        joins = [device.join(round, SUBJECT, contribution(0.5, 1.0, None), LATER) for round in (1, 2)]
        assert len({key for join in joins for key in (join.sealing, join.masking, join.promise)}) == 6
