"""After an outage the outbox waits for those who were here before."""

from __future__ import annotations

import threading

from agent.peers.reunion import Reunion
from protocol.topics import STATUS
from protocol.transport.base import Delivery
from tests.agent.peers.devices import PATIENCE, A, eventually


class Meeting:
    def __init__(self, *others: str, seconds: float = PATIENCE) -> None:
        self.completed = 0
        self.threads: set[int] = set()
        self.reunion = Reunion(A, lambda: set(others), self._complete, seconds)

    def _complete(self) -> None:
        self.threads.add(threading.get_ident())
        self.completed += 1

    def status(self, name: str) -> None:
        self.reunion.status(Delivery(A.path(STATUS, name), b"{}", False))


def test_nobody_is_waited_for_who_was_not_here() -> None:
    meeting = Meeting()
    meeting.reunion.up()
    assert meeting.completed == 1
    meeting.status("stranger")
    assert meeting.completed == 1


def test_complete_when_all_have_been_heard_of_and_only_once() -> None:
    meeting = Meeting("lamp", "fridge")
    meeting.reunion.up()
    meeting.status("lamp")
    meeting.status("stranger")
    meeting.reunion.status(Delivery("skerry/1/home/B/fridge/status", b"", False))
    assert meeting.completed == 0
    meeting.status("fridge")
    meeting.status("lamp")
    assert meeting.completed == 1


def test_whoever_does_not_come_back_is_not_waited_for_for_ever() -> None:
    meeting = Meeting("lamp", seconds=0.01)
    meeting.reunion.up()
    eventually(lambda: meeting.completed == 1)
    meeting.status("lamp")
    assert meeting.completed == 1


def test_a_connection_that_is_lost_again_completes_nothing() -> None:
    meeting = Meeting("lamp")
    meeting.reunion.up()
    meeting.reunion.down()
    meeting.status("lamp")
    assert meeting.completed == 0
    meeting.reunion.up()
    meeting.status("lamp")
    assert meeting.completed == 1
