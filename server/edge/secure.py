"""The edge's part in a secure round (protocol/secure.py): a state machine without threads, clock or network.

Devices that join are put into cohorts. Each cohort takes its own steps: a step ends when all who are expected have
answered, or after `patience` seconds with those who have. A cohort that falls below its threshold gives no sum, and
what was received of it tells nothing. All of this is in RAM only: what an edge that restarts had begun comes to
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from protocol.errors import ConfigError, ProtocolError
from protocol.rounds import MAX_SUBJECTS, Subject
from protocol.secure import (
    LEAST_MEMBERS,
    MAX_MEMBERS,
    Cohort,
    Consent,
    Join,
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
    weak,
)
from protocol.shamir import combine
from protocol.signing import verify
from protocol.sums import Sum, nothing, read, unpacked
from protocol.topics import Cluster

Outgoing: TypeAlias = tuple[str, Message]  # to this device
KeyOf: TypeAlias = Callable[[str], bytes | None]


_MOST_SAID = 16  # messages of a device in a round, of which five are due; each may cost a signature to check


@dataclass(frozen=True, slots=True)
class SecureOptions:
    """`least`, `most`: members of a cohort. `patience`: seconds of each step. Raises ConfigError."""

    least: int = 8
    most: int = MAX_MEMBERS
    patience: float = 10.0

    def __post_init__(self) -> None:
        if self.least < LEAST_MEMBERS or not 2 * self.least <= self.most <= MAX_MEMBERS:
            raise ConfigError(
                f"cohorts of {self.least} to {self.most} devices: at least {LEAST_MEMBERS} and at most {MAX_MEMBERS} "
                "are possible, and the largest has to be twice the smallest, so that nobody is left over"
            )
        if not self.patience > 0.0:
            raise ConfigError(f"a patience of {self.patience} s lets no device answer: choose some seconds")


class Result(NamedTuple):
    """`total` is None if the cohort came to nothing, for `reason`."""

    subject: Subject
    members: int
    total: Sum | None
    reason: str = ""


class _Refused(Exception):
    """`args[0]`: the reason, as it is counted."""


class _Run:
    """One cohort's way through the steps. `keys`: the members' identities. `result` is there once it is over."""

    def __init__(self, cohort: Cohort, keys: list[bytes], patience: float, now: float) -> None:
        self.result: Result | None = None
        self.due = now + patience
        self.names = list(cohort.places)
        self._cohort = cohort
        self._keys = keys
        self._patience = patience
        self._expected: Collection[int] = range(len(cohort.members))
        self._dealers: list[int] = []
        self._survivors: list[int] = []
        self._boxes: dict[int, list[bytes | None]] = {}  # by place, as all that follows
        self._values: dict[int, bytes] = {}
        self._consents: dict[int, bytes] = {}
        self._shares: dict[int, list[bytes | None]] = {}
        self._step: type[Shares | Masked | Consent | Reveal] = Shares

    def begin(self) -> list[Outgoing]:
        setting, members = self._cohort.setting, self._cohort.members
        return self._to(range(len(members)), Roll(setting.round, setting.subject, list(members)))

    def heard(self, sender: str, message: Message, now: float) -> list[Outgoing]:
        """Raises _Refused."""
        place = self._cohort.places[sender]
        if not isinstance(message, self._step):
            raise _Refused("out_of_step")
        if message.cohort != self._cohort.id:
            raise _Refused("other_cohort")
        if place not in self._expected:
            raise _Refused("not_expected")
        if place in self._answers():
            raise _Refused("duplicate")
        self._take(place, message)
        if self._step is Reveal and len(self._shares) >= self._cohort.threshold:
            self._finish()
        return self._next(now) if len(self._answers()) == len(self._expected) else []

    def tick(self, now: float) -> list[Outgoing]:
        return self._next(now) if now >= self.due else []

    def _answers(self) -> Mapping[int, object]:
        answers: dict[type[Message], Mapping[int, object]]
        answers = {Shares: self._boxes, Masked: self._values, Consent: self._consents, Reveal: self._shares}
        return answers[self._step]

    def _take(self, place: int, message: Shares | Masked | Consent | Reveal) -> None:
        count = len(self._cohort.members)
        if isinstance(message, Shares):
            if len(message.boxes) != count or [at for at in range(count) if message.boxes[at] is None] != [place]:
                raise _Refused("malformed")
            self._boxes[place] = message.boxes
        elif isinstance(message, Masked):
            self._values[place] = message.values
        elif isinstance(message, Consent):
            signed = self._cohort.consent(self._dealers, self._survivors)
            if not verify(self._keys[place], message.signature, signed):
                raise _Refused("bad_signature")
            self._consents[place] = message.signature
        else:
            if len(message.shares) != count:
                raise _Refused("malformed")
            self._shares[place] = message.shares

    def _next(self, now: float) -> list[Outgoing]:
        """The step is over. Whoever has not answered has left."""
        if self.result is not None:
            return []
        here = sorted(self._answers())
        if len(here) < self._cohort.threshold:
            self._fail(f"too_few_{self._step.__name__.lower()}")
            return []
        self._expected, self.due = here, now + self._patience
        id, count = self._cohort.id, len(self._cohort.members)
        if self._step is Shares:
            self._step, self._dealers = Masked, here
            boxes, self._boxes = self._boxes, {}
            for_each = {to: [boxes[of][to] if of in boxes else None for of in range(count)] for to in here}
            return [(self._name(to), Relay(id, here, mine)) for to, mine in for_each.items()]
        if self._step is Masked:
            self._step, self._survivors = Consent, here
            return self._to(here, Survivors(id, here))
        if self._step is Consent:
            self._step = Reveal
            return self._to(here, Proof(id, [self._consents.get(place) for place in range(count)]))
        self._fail("unrecoverable")  # enough have revealed their shares, but these are not all right
        return []

    def _finish(self) -> None:
        """The masks of the sum are undone, if the shares so far allow it."""
        cohort, total = self._cohort, nothing()
        for place in self._survivors:
            seed = self._recovered(place, self._is_own)
            if seed is None:
                return
            total = total + unpacked(self._values[place]) - cohort.own_mask(place, seed)
        for lost in set(self._dealers) - set(self._survivors):
            seed = self._recovered(lost, self._is_key)
            if seed is None:
                return
            key = cohort.setting.masking_key(self._name(lost), seed)
            for place in self._survivors:
                total = total + cohort.pair_mask(key, lost, place)
        try:
            self.result = Result(cohort.setting.subject, len(cohort.members), read(total, len(self._survivors)))
        except ProtocolError:
            self._fail("out_of_range")

    def _is_own(self, seed: bytes, of: Member) -> bool:
        return self._cohort.setting.promise(of.name, seed) == of.promise

    def _is_key(self, seed: bytes, of: Member) -> bool:
        return self._cohort.setting.masking_key(of.name, seed).public_key().public_bytes_raw() == of.masking

    def _recovered(self, of: int, right: Callable[[bytes, Member], bool]) -> bytes | None:
        """The seed that these shares give. Of k shares each row of `threshold` is tried, round and round, so that a
        wrong one does no harm once there is one more than needed."""
        held = [(place, share) for place, shares in sorted(self._shares.items()) if (share := shares[of]) is not None]
        need = self._cohort.threshold
        for start in range(len(held) if len(held) > need else len(held) == need):
            try:
                seed = combine(dict((held + held)[start : start + need]))
            except ValueError:
                continue
            if right(seed, self._cohort.members[of]):
                return seed
        return None

    def _fail(self, reason: str) -> None:
        self.result = Result(self._cohort.setting.subject, len(self._cohort.members), None, reason)

    def _name(self, place: int) -> str:
        return self._cohort.members[place].name

    def _to(self, places: Collection[int], message: Message) -> list[Outgoing]:
        return [(self._name(place), message) for place in places]


class SecureRound:
    """One round of a cluster. `until`: when devices can no longer join, by the clock of `now`. `key_of`: a device's
    identity by name, as its status announced it; None: unknown. `results`: of cohorts that are over; `refused`: counts
    messages by reason. Not thread-safe.

    What the edge can check: who takes part, that shares and consents are genuine, and that each sum is possible. What
    it can't: whether a device's own value is true. One of n that lies moves the mean of its cohort up to the ends of
    [0, 1]; of the ordinary means against that, only those that compare whole cohorts are left.
    """

    def __init__(
        self, cluster: Cluster, round: int, key_of: KeyOf, until: float, options: SecureOptions | None = None
    ) -> None:
        self.results: list[Result] = []
        self.refused: Counter[str] = Counter()
        self._cluster = cluster
        self._round = round
        self._key_of = key_of
        self._until = until
        self._options = options or SecureOptions()
        self._joined: dict[str, bytes] = {}  # identities, by name
        self._used: set[bytes] = set()
        self._waiting: dict[Subject, list[Member]] = {}
        self._runs: dict[str, _Run] = {}  # by the names of their members
        self._said: Counter[str] = Counter()
        self._open = True

    @property
    def over(self) -> bool:
        """Nothing more will come of it."""
        return not self._open and not self._runs

    def heard(self, sender: str, message: Message, now: float) -> list[Outgoing]:
        """What a device said, whose name the broker proves, and what to send to whom."""
        self._said[sender] += 1
        try:
            if self._said[sender] > _MOST_SAID:
                raise _Refused("flood")
            if isinstance(message, Join):
                return self._join(sender, message, now)
            run = self._runs.get(sender)
            if run is None and sender in self._joined and isinstance(message, Reveal):
                return []  # enough had come before
            if run is None:
                raise _Refused("late" if sender in self._joined else "not_joined")
            outgoing = run.heard(sender, message, now)
        except _Refused as refusal:
            self.refused[refusal.args[0]] += 1
            return []
        self._collect(run)
        return outgoing

    def tick(self, now: float) -> list[Outgoing]:
        """To be called now and then, at least once a second: ends what has waited long enough."""
        outgoing: list[Outgoing] = []
        if self._open and now >= self._until:
            self._open = False
            for subject, members in self._waiting.items():
                outgoing += self._last(subject, members, now)
            self._waiting.clear()
        for run in dict.fromkeys(self._runs.values()):
            outgoing += run.tick(now)
            self._collect(run)
        return outgoing

    def _join(self, sender: str, join: Join, now: float) -> list[Outgoing]:
        if not self._open or now >= self._until:
            raise _Refused("late")
        if join.round != self._round:
            raise _Refused("other_round")
        if sender in self._joined:
            raise _Refused("duplicate")
        if join.subject not in self._waiting and len(self._waiting) >= MAX_SUBJECTS:
            raise _Refused("subjects")
        member = Member(sender, join.sealing, join.masking, join.promise, join.signature)
        key = self._key_of(sender)
        flaw = Setting(self._cluster, self._round, join.subject).flaw(member, key)
        if flaw is not None or key is None:
            raise _Refused(flaw or "unknown")
        if weak(join.sealing) or weak(join.masking):
            raise _Refused("weak_key")  # with which no other member would go on
        if key in self._used:
            raise _Refused("two_names")  # the members would refuse a roll with both
        self._joined[sender] = key
        self._used.add(key)
        waiting = self._waiting.setdefault(join.subject, [])
        waiting.append(member)
        most = self._options.most
        if len(waiting) < most + self._options.least:
            return []  # were a cohort formed now, the rest might be too few for one
        self._waiting[join.subject] = waiting[most:]
        return self._start(join.subject, waiting[:most], now)

    def _last(self, subject: Subject, members: list[Member], now: float) -> Iterator[Outgoing]:
        """Those who wait when no more can join, in cohorts of about equal size."""
        if len(members) < self._options.least:
            if members:
                self.results.append(Result(subject, len(members), None, "too_few_joined"))
            return
        parts = -(-len(members) // self._options.most)
        for part in range(parts):
            yield from self._start(subject, members[part::parts], now)

    def _start(self, subject: Subject, members: list[Member], now: float) -> list[Outgoing]:
        cohort = Cohort(Setting(self._cluster, self._round, subject), sorted(members, key=lambda member: member.name))
        run = _Run(cohort, [self._joined[member.name] for member in cohort.members], self._options.patience, now)
        self._runs.update(dict.fromkeys(cohort.places, run))
        return run.begin()

    def _collect(self, run: _Run) -> None:
        if run.result is not None:
            self.results.append(run.result)
            for name in run.names:
                del self._runs[name]
