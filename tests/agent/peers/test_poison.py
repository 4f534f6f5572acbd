"""A peer whose entries are genuine, well-formed and wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from agent.peers.intake import Verdict
from protocol.transport.bus import Bus
from tests.agent.peers.devices import Device, acquainted, eventually
from tests.protocol.entries import SPACE, TAIL, entry, key_of

RIGHT, WRONG = 7, 13


def write(device: Device, numbers: range, rng: np.random.Generator) -> Counter[bytes]:
    """One answer: each step is looked up, and a hit that is audited is emitted as the cloud says. How many tokens
    each origin had its way with."""
    emitted: Counter[bytes] = Counter()
    for number in numbers:
        near = device.memory.neighbours(SPACE, key_of(number), TAIL, 1)
        if not near or near[0].similarity < 0.99:
            continue
        origin = near[0].origin
        if rng.random() < device.trust.audit_rate([origin]):
            device.trust.note(origin, wrong=near[0].token != RIGHT)
        else:
            emitted[origin] += 1
    return emitted


@pytest.mark.parametrize("good_first", [0, 200])
def test_its_share_of_the_tokens_goes_to_zero(tmp_path: Path, good_first: int) -> None:
    bus = Bus()
    with (
        Device(tmp_path, "lamp", 1, bus=bus) as lamp,
        Device(tmp_path, "good", 2, bus=bus) as good,
        Device(tmp_path, "evil", 3, bus=bus) as evil,
    ):
        acquainted(lamp, good, evil)
        for number in range(400):
            (good if number % 2 else evil).learn(number, RIGHT if number % 2 or number < good_first else WRONG)
        eventually(lambda: lamp.network.intake.counts[Verdict.ACCEPTED] == 400)
        rng = np.random.default_rng(0)
        first = write(lamp, range(400), rng)
        standing = lamp.trust.standing(evil.who.public)
        assert standing.quarantined
        assert round(standing.wrong) <= lamp.trust.audits_to_quarantine
        if good_first == 0:
            assert first[evil.who.public] == 0  # not one of its tokens was emitted without the cloud's word
        assert first[good.who.public] > 100

        # From now on it can do what it likes.
        for number in range(400, 450):
            evil.learn(number, WRONG)
        eventually(lambda: lamp.network.intake.counts[Verdict.QUARANTINED] == 50)
        good.network.intake.keep([entry(evil.who, 500, token=WRONG)])  # which passes it on in an answer
        good.memory.flush()
        assert lamp.told(500, lambda entries: pytest.fail("it was believed")) is None
        assert write(lamp, range(600), rng)[evil.who.public] == 0
        assert all(
            one.origin != evil.who.public
            for n in range(600)
            for one in lamp.memory.neighbours(SPACE, key_of(n), TAIL, 8)
        )
    bus.close()
