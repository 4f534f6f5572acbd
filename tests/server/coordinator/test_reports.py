from __future__ import annotations

from protocol.rounds import MAX_JUMP, MAX_NUMBER, Report
from server.coordinator.reports import Reports, Verdict

SILENCE = 100.0


def told(reports: Reports, number: int, now: float, *, retained: bool = False) -> Verdict:
    return reports.take("A", Report(number), now, retained=retained)


def test_numbers_have_to_grow() -> None:
    reports = Reports({}, SILENCE)
    assert told(reports, 5, 0.0) is Verdict.ACCEPTED
    assert told(reports, 4, 1.0) is Verdict.OLD
    assert told(reports, 5, 1.0) is Verdict.REPEATED
    assert told(reports, 6, 1.0) is Verdict.ACCEPTED
    assert reports.heard["A"].report.number == 6


def test_an_edge_whose_devices_have_lifted_its_numbers_is_heard_all_the_same() -> None:
    reports = Reports({}, SILENCE)
    assert told(reports, 5, 0.0) is Verdict.ACCEPTED
    assert told(reports, 5 + MAX_JUMP + 1, 0.0) is Verdict.ACCEPTED  # by one of them
    assert told(reports, 5 + 20 * (MAX_JUMP + 1), 0.0) is Verdict.ACCEPTED  # by many, while it was not connected


def test_a_number_too_high_shuts_a_cluster_out_for_the_stated_time_at_most() -> None:
    reports = Reports({}, SILENCE)
    assert told(reports, MAX_NUMBER, 0.0) is Verdict.ACCEPTED
    assert told(reports, 6, SILENCE) is Verdict.OLD
    assert told(reports, 6, 1.0 + SILENCE) is Verdict.ACCEPTED


def test_a_silent_cluster_counts_for_the_stated_time() -> None:
    reports = Reports({}, SILENCE)
    told(reports, 5, 10.0)
    assert reports.seconds_left(10.0) == SILENCE
    assert reports.present(10.0 + SILENCE).keys() == {"A"}
    assert reports.present(10.1 + SILENCE) == {}
    assert reports.seconds_left(10.1 + SILENCE) == float("inf")


def test_what_a_broker_repeats_does_not_make_a_report_younger() -> None:
    reports = Reports({}, SILENCE)
    told(reports, 5, 0.0)
    assert told(reports, 5, SILENCE, retained=True) is Verdict.REPEATED
    assert reports.present(1.0 + SILENCE) == {}


def test_a_cluster_that_counts_no_more_may_begin_anew_if_it_speaks_now() -> None:
    reports = Reports({}, SILENCE)
    told(reports, 5, 0.0)
    assert told(reports, 1, SILENCE) is Verdict.OLD
    assert told(reports, 1, 1.0 + SILENCE, retained=True) is Verdict.OLD
    assert told(reports, 1, 1.0 + SILENCE) is Verdict.ACCEPTED
