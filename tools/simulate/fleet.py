"""A fleet of simulated devices, all on one thread."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from statistics import fmean

import numpy as np

from protocol.errors import LinkError
from protocol.topics import AGREED, CALL, DIRECTORY, EDGE, REPORT, Cluster
from tools.simulate.device import Device
from tools.simulate.loop import Loop
from tools.simulate.member import Member, Plan, Site
from tools.simulate.world import Nature

_AT_ONCE = 64  # connections that are being made
_BACK_SECONDS = 3.0  # over which those that were away come back
_TURN_SECONDS = 0.1
_SAY_SECONDS = 2.0

Say = Callable[[str], None]


class Fleet:
    """Devices as `plan` says, that connect to the broker at `address`. `alive` raises if there is no edge any more."""

    def __init__(self, plan: Plan, cluster: Cluster, address: tuple[str, int], say: Say) -> None:
        self.plan = plan
        self.loop = Loop()
        self.site = Site(cluster, self.loop, address, plan, Random(plan.seed))
        self.alive: Callable[[], None] = lambda: None
        self._say = say
        self._what, self._said = "", time.monotonic()
        self._world = np.random.default_rng(plan.seed)
        self._away: list[Member] = []
        hostile = set(self.site.random.sample(range(plan.devices), int(plan.hostile * plan.devices)))
        natures = (Nature.draw(self._world) for _ in range(plan.devices))
        self.devices = [Device(f"d{at:05d}", nature, at in hostile) for at, nature in enumerate(natures)]
        self._members = [Member(self.site, device) for device in self.devices]

    def close(self) -> None:
        self.loop.close()

    def connect(self) -> None:
        """All of them, a few at a time: a broker's queue of new connections is short."""
        waiting, total = deque(self._members), len(self._members)
        while self.site.here < total:
            while waiting and total - len(waiting) - self.site.here < _AT_ONCE:
                waiting.popleft().connect()
            self.loop.turn(_TURN_SECONDS)
            self._tell("connecting", f"{self.site.here}/{total}")

    def forget(self) -> None:
        """Removes from a broker that goes on running what it would keep: sessions and retained messages. The edge has
        ended."""
        site = self.site
        self.alive = lambda: None
        kept = [site.cluster.path(kind, EDGE) for kind in (CALL, AGREED, REPORT, DIRECTORY)]
        for member in self._members:
            member.leave(politely=False)
        waiting = deque([(EDGE, kept), *((device.name, []) for device in self.devices)])
        total, ended = len(waiting), Counter[str]()
        while ended.total() < total:
            while waiting and total - len(waiting) - ended.total() < _AT_ONCE:
                name, topics = waiting.popleft()
                self.loop.erase(site.address, site.client_id(name), topics, lambda: ended.update(["sessions"]))
            self.loop.turn(_TURN_SECONDS)
            self._tell("removing sessions", f"{ended.total()}/{total}")

    def live(self) -> None:
        """Each device takes its steps until the next round and learns from them, while the connections are served."""
        for at, device in enumerate(self.devices):
            device.live(self._world)
            if at % 16 == 0:
                self.loop.turn(0.0)
                self._tell("devices learn", f"{at}/{len(self.devices)}")

    def scatter(self) -> None:
        """Some go away: half of them say so."""
        self._away = self.site.random.sample(self._members, self.site.plan.gone)
        for at, member in enumerate(self._away):
            member.leave(politely=at % 2 == 0)
        self.until(lambda: self.site.here == self.site.plan.present, "devices go away")

    def gather(self) -> None:
        """They come back, one by one."""
        for member in self._away:
            self.loop.later(_BACK_SECONDS * self.site.random.random(), member.connect)

    def all_answered(self) -> bool:
        """All are here, and what they answered last has been acknowledged."""
        last = max(self.site.called)
        return self.site.here == len(self.devices) and all(device.answered == last for device in self.devices)

    def off(self) -> float:
        """Mean distance of the honest devices' thresholds from their own best ones."""
        return fmean(device.off for device in self.devices if not device.hostile)

    def until(self, holds: Callable[[], bool], what: str, done: Callable[[], str] = lambda: "") -> None:
        """Serves the connections until then. `done`: how far it is. Raises LinkError if it takes too long."""
        give_up = time.monotonic() + 2.0 * self.plan.patience
        while not holds():
            self.alive()
            if time.monotonic() > give_up:
                raise LinkError(f"gave up waiting: {what}: {self.site.here} devices are connected")
            self.loop.turn(_TURN_SECONDS)
            self._tell(what, done())

    def _tell(self, what: str, done: str = "") -> None:
        """At once if it is something else than the last time, then every now and then."""
        if what != self._what or time.monotonic() - self._said > _SAY_SECONDS:
            self._what, self._said = what, time.monotonic()
            self._say(f"{what}: {done}" if done else what)
