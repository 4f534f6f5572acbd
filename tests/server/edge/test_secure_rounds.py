"""Secure rounds from the edge's side: exact sums whoever leaves when, nothing below the threshold, and no wrong sum."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigError
from protocol.secure import (
    Cohort,
    Consent,
    Join,
    Masked,
    Message,
    Proof,
    Relay,
    Reveal,
    Roll,
    Setting,
    Shares,
    threshold,
)
from protocol.shamir import combine
from protocol.sums import MASK_BYTES, contribution
from server.edge.secure import SecureOptions
from tests.server.edge.secure_fleet import PLACE, SUBJECT, Fleet, someone

SMALL = SecureOptions(least=3, most=8, patience=5.0)
LARGE = SecureOptions(least=3, most=32, patience=5.0)
STEPS: tuple[type, ...] = (Shares, Masked, Consent, Reveal)


def gone_before(step: type, gone: dict[str, type]) -> int:
    return sum(STEPS.index(last) <= STEPS.index(step) for last in gone.values())


class TestSums:
    @pytest.mark.parametrize("count", [3, 8, 32])
    def test_everybody_stays(self, count: int) -> None:
        fleet = Fleet(count, LARGE)
        fleet.join()
        fleet.closed()
        fleet.run()
        (result,) = fleet.edge.results
        assert (result.subject, result.members, result.total) == (SUBJECT, count, fleet.expected(fleet.names))
        assert not fleet.edge.refused
        assert not any(device.refused for device in fleet.devices.values())

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(count=st.integers(3, 32), data=st.data())
    def test_whoever_leaves_at_whatever_step(self, count: int, data: st.DataObject) -> None:
        """The sum is that of all who sent their masked values, as long as enough stay; else there is none, and nobody
        has revealed a share."""
        fleet = Fleet(count, LARGE)
        leaving = data.draw(st.integers(0, min(count, count - threshold(count) + 1)))
        names = data.draw(st.permutations(fleet.names))[:leaving]
        gone = {name: data.draw(st.sampled_from(STEPS)) for name in names}
        fleet.join()
        fleet.closed()
        fleet.run(gone)
        (result,) = fleet.edge.results
        lost_at = next((step for step in STEPS if count - gone_before(step, gone) < threshold(count)), None)
        if lost_at is None:
            assert result.total == fleet.expected(fleet.senders(Masked))
            assert len(fleet.senders(Masked)) == count - gone_before(Masked, gone)
        else:
            assert (result.total, result.reason) == (None, f"too_few_{lost_at.__name__.lower()}")
            assert lost_at is Reveal or not fleet.senders(Reveal)

    def test_all_leave_at_each_step(self) -> None:
        for step in STEPS:
            fleet = Fleet(4, SMALL)
            fleet.join()
            fleet.closed()
            fleet.run(dict.fromkeys(fleet.names, step))
            assert fleet.edge.results[0].total is None
            assert not fleet.senders(Reveal)

    def test_each_device_reveals_one_kind_of_share_of_each(self) -> None:
        fleet = Fleet(8, SMALL)
        fleet.join()
        fleet.closed()
        fleet.run({"d01": Masked, "d02": Shares})
        reveals = {name: message for name, message in fleet.sent if isinstance(message, Reveal)}
        cohort = cohort_of(fleet.told[0][1])
        for place, member in enumerate(cohort.members):
            shares = {cohort.places[name]: share for name, m in reveals.items() if (share := m.shares[place])}
            if member.name == "d02":  # which has dealt none
                assert not shares
                continue
            assert len(shares) == len(reveals) == cohort.threshold
            seed = combine(shares)
            key = cohort.setting.masking_key(member.name, seed).public_key().public_bytes_raw()
            known = (cohort.setting.promise(member.name, seed) == member.promise, key == member.masking)
            assert known == ((False, True) if member.name == "d01" else (True, False))

    def test_what_the_edge_sees_of_a_value_is_uniform(self) -> None:
        """The same values in 40 rounds: every bit of what is sent is 0 in some and 1 in others."""
        seen: list[int] = []
        for round in range(40):
            fleet = Fleet(3, SMALL, round)
            fleet.join()
            fleet.closed()
            fleet.run()
            (masked,) = [message for name, message in fleet.sent if isinstance(message, Masked) and name == "d00"]
            seen.append(int.from_bytes(masked.values, "little"))
        ones = [sum(value >> bit & 1 for value in seen) for bit in range(8 * MASK_BYTES)]
        assert min(ones) > 4
        assert max(ones) < 36

    @pytest.mark.parametrize(("count", "most_bytes"), [(8, 6_000), (32, 20_000)])
    def test_the_cost_of_a_device(self, count: int, most_bytes: int) -> None:
        fleet = Fleet(count, SecureOptions(4, max(8, count)))
        fleet.join()
        fleet.closed()
        fleet.run()
        assert len(fleet.wire) == 9 * count
        assert sum(size for _, _, size in fleet.wire) / count < most_bytes


class TestCohorts:
    @pytest.mark.parametrize("count", [3, 7, 8, 9, 11, 16, 19, 40])
    def test_nobody_is_left_over(self, count: int) -> None:
        fleet = Fleet(count, SMALL)
        fleet.join()
        fleet.closed()
        fleet.run()
        sizes = [result.members for result in fleet.edge.results]
        assert sum(sizes) == count
        assert 3 <= min(sizes) <= max(sizes) <= 8
        assert all(result.total for result in fleet.edge.results)

    def test_a_full_cohort_does_not_wait_for_the_last_devices(self) -> None:
        fleet = Fleet(11, SMALL)
        fleet.join()
        while told := fleet.told_next():
            fleet.deliver(told)
        assert [result.members for result in fleet.edge.results] == [8]
        assert not fleet.edge.over

    def test_too_few_are_told_nothing(self) -> None:
        fleet = Fleet(2, SMALL)
        fleet.join()
        fleet.closed()
        fleet.run()
        assert [(result.members, result.total, result.reason) for result in fleet.edge.results] == [
            (2, None, "too_few_joined")
        ]
        assert not fleet.told

    def test_subjects_are_not_mixed(self) -> None:
        fleet = Fleet(8, SMALL)
        fleet.join(fleet.names[:4])
        fleet.join(fleet.names[4:], "ff" * 8)
        fleet.closed()
        fleet.run()
        assert {result.subject: result.total for result in fleet.edge.results} == {
            SUBJECT: fleet.expected(fleet.names[:4]),
            "ff" * 8: fleet.expected(fleet.names[4:]),
        }

    @pytest.mark.parametrize("wrong", [{"least": 2}, {"most": 33}, {"least": 8, "most": 15}, {"patience": 0.0}])
    def test_impossible_options(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ConfigError):
            SecureOptions(**wrong)  # type: ignore[arg-type]


def signed(name: str, sealing: bytes | None = None, round: int = 7) -> Join:
    """A Join that `name` has made with keys of its own choice."""
    key = X25519PrivateKey.from_private_bytes(bytes([9]) * 32).public_key().public_bytes_raw()
    other = X25519PrivateKey.from_private_bytes(bytes([8]) * 32).public_key().public_bytes_raw()
    keys = key if sealing is None else sealing, other
    text = Setting(PLACE, round, SUBJECT).member(name, *keys, bytes(32))
    return Join(round, SUBJECT, *keys, bytes(32), someone(name).sign(text))


class TestRefused:
    """By the edge: counted, and without effect on the sum."""

    def finishes(self, fleet: Fleet, *reasons: str) -> None:
        assert fleet.edge.refused == dict.fromkeys(reasons, 1)
        fleet.run()
        assert fleet.edge.results[0].total == fleet.expected(fleet.names)

    @pytest.mark.parametrize(
        ("name", "join", "reason"),
        [
            ("stranger", signed("stranger"), "unknown"),
            ("d00", signed("d01"), "bad_signature"),
            ("d00", signed("d00", bytes(32)), "weak_key"),
            ("d00", signed("d00", round=6), "other_round"),
        ],
    )
    def test_joins(self, name: str, join: Join, reason: str) -> None:
        fleet = Fleet(4, SMALL)
        fleet.says(name, join)
        fleet.join()
        fleet.closed()
        self.finishes(fleet, reason)

    def test_a_replayed_join(self) -> None:
        """Of an earlier round, with the number of this one."""
        fleet = Fleet(4, SMALL)
        old = signed("d00", round=6)
        fleet.says("d00", Join(7, SUBJECT, old.sealing, old.masking, old.promise, old.signature))
        fleet.join()
        fleet.closed()
        self.finishes(fleet, "bad_signature")

    def test_joining_twice_or_late_or_under_two_names(self) -> None:
        fleet = Fleet(4, SMALL)
        fleet.known["twin"] = fleet.known["d00"]
        fleet.join()
        fleet.says("d00", signed("d00"))
        twin = Setting(PLACE, 7, SUBJECT).member("twin", signed("d00").sealing, signed("d00").masking, bytes(32))
        as_twin = Join(7, SUBJECT, signed("d00").sealing, signed("d00").masking, bytes(32), someone("d00").sign(twin))
        fleet.says("twin", as_twin)
        fleet.closed()
        fleet.says("late", signed("late"))
        self.finishes(fleet, "duplicate", "two_names", "late")

    def test_messages_of_the_wrong_form_cohort_step_or_sender(self) -> None:
        fleet = Fleet(4, SMALL)
        told = fleet.upto(Roll)
        fleet.says("stranger", Consent(bytes(32), bytes(64)))
        fleet.says("d00", Masked(cohort_of(told[0][1]).id, bytes(MASK_BYTES)))
        fleet.says("d00", Shares(cohort_of(told[0][1]).id, [None] * 4))
        fleet.says("d00", Shares(bytes(32), [None] * 4))
        fleet.deliver(told[:1])
        fleet.says(*fleet.sent[-1])
        fleet.deliver(told[1:])
        self.finishes(fleet, "not_joined", "out_of_step", "malformed", "other_cohort", "duplicate")

    def test_whoever_missed_a_step_is_not_heard_in_the_next(self) -> None:
        fleet = Fleet(8, SMALL)
        told = fleet.upto(Roll)
        fleet.deliver(told, {"d03": Shares})
        fleet.wait()
        fleet.says("d03", Masked(cohort_of(told[0][1]).id, bytes(MASK_BYTES)))
        assert fleet.edge.refused == {"not_expected": 1}
        fleet.run()
        assert fleet.edge.results[0].total == fleet.expected(set(fleet.names) - {"d03"})

    def test_a_flood(self) -> None:
        fleet = Fleet(4, SMALL)
        told = fleet.upto(Relay)
        for _ in range(20):
            fleet.says("d00", Consent(bytes(32), bytes(64)))
        assert fleet.edge.refused == {"out_of_step": 14, "flood": 6}
        fleet.deliver(told)
        fleet.run()
        assert fleet.edge.results[0].total == fleet.expected(fleet.names[1:])

    def test_a_forged_consent(self) -> None:
        fleet = Fleet(4, SMALL)
        told = fleet.upto(Relay)
        cohort = cohort_of(fleet.told[0][1])
        fleet.deliver(told)
        fleet.says("d00", Consent(cohort.id, someone("d01").sign(cohort.consent(range(4), range(4)))))
        self.finishes(fleet, "bad_signature")


def cohort_of(roll: Message, round: int = 7) -> Cohort:
    assert isinstance(roll, Roll)
    return Cohort(Setting(PLACE, round, SUBJECT), roll.members)


class TestLies:
    """Of devices, that the edge can't see at once."""

    def revealed(self, liars: int) -> Fleet:
        fleet = Fleet(8, SMALL)
        told = fleet.upto(Proof)
        for name in fleet.names[:liars]:
            fleet.says(name, Reveal(cohort_of(fleet.told[0][1]).id, [bytes(17)] * 8))
        fleet.deliver(told[liars:])
        fleet.run()
        return fleet

    @pytest.mark.parametrize("liars", [1, 2])
    def test_wrong_shares_do_no_harm_as_long_as_enough_are_right(self, liars: int) -> None:
        fleet = self.revealed(liars)
        assert fleet.edge.results[0].total == fleet.expected(fleet.names)

    def test_wrong_shares_never_give_a_wrong_sum(self) -> None:
        assert self.revealed(3).edge.results[0][2:] == (None, "unrecoverable")

    def test_a_value_that_is_no_contribution_spoils_its_cohort_and_is_noticed(self) -> None:
        fleet = Fleet(8, SMALL)
        fleet.values["d03"] = contribution(0.5, 1.0, None) + (1 << 60)
        fleet.join()
        fleet.closed()
        fleet.run()
        assert fleet.edge.results[0][2:] == (None, "out_of_range")

    def test_boxes_that_do_not_open_count_as_none(self) -> None:
        """Nobody holds shares of a device that sent such, so its own mask stays on: no sum, and no wrong one."""
        fleet = Fleet(8, SMALL)
        told = fleet.upto(Roll)
        cohort = cohort_of(told[0][1])
        fleet.deliver([each for each in told if each[0] != "d03"])
        fleet.says("d03", Shares(cohort.id, [None if at == 3 else bytes(50) for at in range(8)]))
        fleet.run({"d03": Masked})
        assert fleet.edge.results[0].total is None
        assert all(device.refused["bad_box"] == 1 for name, device in fleet.devices.items() if name != "d03")
