"""What an operator wants of the policy; thresholds follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from agent.learn.local import learn
from agent.learn.losses import PriceLoss
from agent.learn.risk import highest_threshold
from agent.learn.sample import Histogram, Own, Sample
from protocol.errors import ConfigError

CERTAIN = float("inf")  # evidence of a threshold that others have no say in

_Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class _Goal(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    @property
    def name(self) -> str:
        """The same for the same goal, on all devices and in all versions: part of a round's subject."""
        fields = ((field, getattr(self, field)) for field in self.__struct_fields__)
        return " ".join([type(self).__name__.lower(), *(f"{field}={value!r}" for field, value in fields)])

    @property
    def federated(self) -> bool:
        """Do devices learn this one's threshold from each other?"""
        return True


class Fixed(_Goal, frozen=True):
    """A threshold, as it is."""

    threshold: _Share

    @property
    def federated(self) -> bool:
        return False


class Price(_Goal, frozen=True):
    """A token of the LLM is worth it where its rejection probability exceeds the price."""

    price: _Share


class Share(_Goal, frozen=True):
    """This share of the steps is sent, audits included."""

    share: _Share


class Bound(_Goal, frozen=True):
    """At most this share of all tokens is kept although the LLM would have written another one. Each device has to
    prove that for its own steps, so no other one's threshold is mixed in."""

    bound: Annotated[float, Meta(gt=0.0, lt=1.0)]
    confidence: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.95

    @property
    def federated(self) -> bool:
        return False


Goal: TypeAlias = Fixed | Price | Share | Bound


def parse(plain: Mapping[str, Any]) -> Goal:
    """From {"kind": "price", "price": 0.2} and the like. Raises ConfigError."""
    try:
        goal: Goal = msgspec.convert(dict(plain), Goal)
        return goal
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"no goal: {error}; a goal is a price, a share, a bound (with a confidence) or a fixed threshold"
        ) from None


def plain(goal: Goal) -> dict[str, Any]:
    """What `parse` takes."""
    return dict(msgspec.to_builtins(goal))


def own(goal: Goal, sample: Sample, seen: Histogram, start: float, audit: float = 0.0) -> Own:
    """What the device would choose by its own data alone. `audit`: share of the steps below the threshold that is sent
    all the same."""
    match goal:
        case Fixed(threshold):
            return Own(threshold, CERTAIN)
        case Price(price):
            return learn(sample, PriceLoss(price), start)
        case Share(share):
            return _share(share, seen, start, audit)
        case Bound(bound, confidence):
            return Own(highest_threshold(sample, bound, confidence), CERTAIN)


def _share(share: float, seen: Histogram, start: float, audit: float) -> Own:
    """Of what is not escalated the share `audit` is sent: escalated + audit (1 - escalated) = share."""
    if not seen.total:
        return Own(start, 0.0)
    escalated = max(0.0, (share - audit) / (1.0 - audit)) if audit < 1.0 else 0.0
    return Own(seen.quantile(1.0 - escalated), seen.total)
