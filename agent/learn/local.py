"""A device learns its threshold from its own sample."""

from __future__ import annotations

from agent.learn.losses import Loss
from agent.learn.sample import Own, Sample

RATE = 0.3  # tau moves by this times what beta is off by: no turns where beta's slope is below 1 / RATE
STEPS = 200  # some 20 are needed from anywhere in [0, 1]; a beta that is off by 0.02 all the way needs them all
_STILL = 1e-4  # a move that ends the descent
_BETTER = 1e-9  # a difference of losses that is not rounding


def learn(sample: Sample, loss: Loss, start: float, *, rate: float = RATE, steps: int = STEPS) -> Own:
    """Descends from `start` along `loss.step`, within [0, 1]. Without a sample `start` stands, with no evidence.

    Each time the direction turns, the rate is halved: it ends, and does not oscillate. Where beta does not rise with
    u, an end may be better than where the descent stands still, and is taken: the result costs no more than `start`.
    """
    start = min(1.0, max(0.0, start))
    if not len(sample):
        return Own(start, 0.0)
    tau, before = start, 0.0
    for _ in range(steps):
        slope = loss.step(sample, tau)
        if slope * before < 0.0:
            rate /= 2.0
        moved = min(1.0, max(0.0, tau - rate * slope))
        if abs(moved - tau) < _STILL:
            break
        tau, before = moved, slope
    best = min((tau, start, 0.0, 1.0), key=lambda at: loss.value(sample, at) + _BETTER * (at != tau))
    return Own(best, loss.evidence(sample, best))
