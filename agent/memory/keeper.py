"""What the device makes of its memory: looks a step up, decides whether that answers it, and learns from the LLM."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.memory.base import Key, Neighbour
from agent.memory.key import TAILS, KeyMaker, keys_beside, shared_tail, space_of, tail
from agent.memory.memory import EntryMemory
from agent.memory.rule import NEIGHBOURS, SAME, Candidate, judge
from agent.memory.rule_evidence import START, Evidence
from agent.peers.resolver import Lookup
from agent.peers.trust import Trust
from agent.resolver import Provenance, Question, Reach, Reply
from models.sampling import uniform
from protocol.errors import ProtocolError
from protocol.memory import Entry, sign_entry
from protocol.resolve import Mode

log = logging.getLogger(__name__)

_AUDIT = 5  # tells the audit's random number from the others of one position (models.sampling.uniform)
_FUSED = 0.9  # share of the vote in the kNN language model's mixture, where a distribution is wanted


@dataclass(slots=True)
class Space:
    """What belongs to one space: who makes its keys, and what was seen of its hits, which `kept` is the file of."""

    keys: KeyMaker
    evidence: Evidence
    kept: Path
    unsaved: bool = False

    def save(self) -> None:
        """A failure is logged: the next time it may work."""
        if not self.unsaved:
            return
        self.unsaved = False
        written = self.kept.with_name(self.kept.name + ".new")
        try:
            written.write_bytes(self.evidence.to_bytes())
            written.replace(self.kept)
        except OSError as error:
            self.unsaved = True
            log.warning("%s: cannot be written: %s", self.kept, error.strerror)


@dataclass(slots=True)
class Look:
    """What memory has to say of one question. `reply` None: it is no hit. `audit`: a hit that the cloud is to be asked
    about all the same, as happens with probability `propensity`. `origins`: whose entries speak for the candidate."""

    space: Space
    lookup: Lookup
    near: list[Neighbour]
    candidate: Candidate | None = None
    reply: Reply | None = None
    origins: tuple[bytes, ...] = ()
    propensity: float = 1.0
    audit: bool = False


class Keeper:
    """Used on the engine's thread, but for `judge` (the transport's), `follow` and `save`. `keys`, `evidence`, `kept`:
    the bare model's; `follow` adds those of adapters. `sign` makes entries this device's own, `own` is its public key.
    `share` is told what was learned; `name_of` puts a name to an origin. `now`: Unix seconds. `counts`: lookups, hits,
    audits by outcome, for metrics."""

    def __init__(
        self,
        memory: EntryMemory,
        keys: KeyMaker,
        trust: Trust,
        evidence: Evidence,
        own: bytes,
        sign: Callable[[bytes], bytes],
        now: Callable[[], float],
        kept: Path,
    ) -> None:
        self.memory = memory
        self.trust = trust
        self.bare = Space(keys, evidence, kept)
        self.counts: Counter[str] = Counter()
        self.share: Callable[[Entry], None] = lambda entry: None
        self.name_of: Callable[[bytes], str] = lambda origin: origin.hex()[:8]
        self._own = own
        self._sign = sign
        self._now = now
        self._lock = threading.Lock()  # of `follow` and `save`
        self._spaces: dict[str, Space] = {"": self.bare}  # by adapter; never changed, but replaced by another one

    @property
    def keys(self) -> KeyMaker:
        """The bare model's."""
        return self.bare.keys

    @property
    def evidence(self) -> Evidence:
        """The bare model's."""
        return self.bare.evidence

    @property
    def spaces(self) -> list[bytes]:
        """Those that this device uses, the bare model's first."""
        return [space.keys.space for space in self._spaces.values()]

    def follow(self, model: str, adapters: Mapping[str, Path]) -> None:
        """These adapters (id to file) of the model (fingerprint) are in use from now on, and no others. Those whose
        keys `prepare_keys` made have memory; what others have learned stays until it is too old. Reads files."""
        with self._lock:
            for id in self._spaces.keys() - adapters.keys() - {""}:
                self._spaces[id].save()
            opened = {id: self._spaces.get(id) or self._open(model, id, path) for id, path in adapters.items()}
            self._spaces = {"": self.bare, **{id: space for id, space in opened.items() if space is not None}}

    def _open(self, model: str, adapter: str, path: Path) -> Space | None:
        keys = KeyMaker.load(keys_beside(path), space_of(model, adapter), self.keys.width)
        if keys is None:
            return None
        kept = path.with_suffix(".evidence")
        return Space(keys, recall_evidence(kept, self.evidence.bound), kept)

    def look(self, question: Question, mode: Mode) -> Look | None:
        """None: the engine gives no hidden states, or nobody makes keys of them."""
        state = question.state
        space = None if state is None else self._spaces.get(state.adapter)
        if state is None or space is None:
            return None
        key, end = space.keys.key(state.hidden), tail(state.recent)
        near = self.memory.neighbours(space.keys.space, key, end, NEIGHBOURS)
        look = Look(space, Lookup(space.keys.space, key, end, space.evidence.theta), near)
        self._weigh(question, look, near, Provenance.MEMORY, mode)
        self.counts["lookups"] += 1
        return look

    def judge(self, question: Question, look: Look, entries: Sequence[Entry], mode: Mode) -> Look:
        """The same question with a peer's entries beside the own ones. On the transport's thread."""
        key, end = look.lookup.key, look.lookup.tail
        known = {_what(near) for near in look.near}
        told = {_what(near): near for near in (_neighbour(entry, key, end) for entry in entries)}
        near = look.near + [neighbour for what, neighbour in told.items() if what not in known]
        near = sorted(near, key=lambda neighbour: -neighbour.similarity)[:NEIGHBOURS]
        found = Look(look.space, look.lookup, look.near)
        self._weigh(question, found, near, Provenance.PEER, mode)
        return found

    def _weigh(
        self, question: Question, look: Look, near: Sequence[Neighbour], provenance: Provenance, mode: Mode
    ) -> None:
        assert question.state is not None
        vocab = len(question.state.logits)  # what others send need not be one of this model's tokens
        near = [n for n in near if n.token < vocab and not self.trust.quarantined(n.origin)]
        candidate = look.candidate = judge(near, question.state.p, question.draft, look.space.evidence)
        if candidate is None:
            return
        look.origins = tuple({n.origin for n in near if n.token == candidate.token})
        if not candidate.hit:
            return
        look.propensity = max(self.trust.audit_rate(look.origins), look.space.evidence.audit_rate)
        look.audit = uniform(question.seed, len(question.answer), _AUDIT) < look.propensity
        # A distribution names the candidate alone, whose origins are audited; the rest of its mass lies where x lies.
        taken = mode == "take"
        look.reply = Reply(
            tokens=[candidate.token] if taken else [],
            tokens_p=[float(candidate.p[0])] if taken else [],
            y_ids=candidate.ids[:1],
            y_p=candidate.p[:1] * np.float32(1.0 if taken else _FUSED),
            y_draft=-1.0,
            provenance=provenance,
            origin="" if candidate.origin == self._own else self.name_of(candidate.origin),
        )

    def used(self, look: Look, reply: Reply) -> None:
        """The hit settled a token."""
        self.counts["hits" if reply.provenance is Provenance.MEMORY else "peer hits"] += 1
        if look.candidate is not None:
            self.memory.used(_kept_here(look.candidate))

    def resolved(self, question: Question, look: Look | None, reply: Reply) -> None:
        """The LLM has answered: what memory would have said is right or wrong, and the answer is kept, if nothing of
        the question had to be hidden."""
        if look is None or not look.lookup.key.any():
            return
        token, p = _likeliest(reply)
        if look.candidate is not None:
            self._compare(question, look, look.candidate, token)
        same = [
            n.id
            for n in look.near
            if n.similarity >= SAME and n.tail == TAILS[-1] and n.token == token and n.origin == self._own
        ]
        if same:
            self.memory.confirm(same[:1])
            return
        if question.reach is not Reach.ANYONE:  # its key is a hidden state of private text, and peers are told entries
            return
        entry = Entry(
            space=look.lookup.space,
            key=look.lookup.key.tobytes(),
            tail=look.lookup.tail,
            token=token,
            p=min(1.0, max(p, 1e-6)),
            count=1,
            time=max(0, int(self._now())),
            origin=self._own,
        )
        entry = sign_entry(entry, self._sign)
        self.memory.learn(entry)
        self.share(entry)

    def _compare(self, question: Question, look: Look, candidate: Candidate, token: int) -> None:
        right = candidate.token == token
        hit = look.reply is not None
        look.space.evidence.note(
            candidate.score,
            memory_right=right,
            draft_right=question.draft == token,
            agree=candidate.token == question.draft,
            propensity=look.propensity if hit else 1.0,
            origin=candidate.origin,
        )
        look.space.unsaved = True
        if hit:
            self.counts["audits right" if right else "audits wrong"] += 1
        elif candidate.score < START:
            return
        # Also of what would have been a hit before theta rose: a liar that made it rise is not to get away with it.
        supporters = _kept_here(candidate)
        if right:
            self.memory.confirm(supporters)
        else:
            self.memory.blame(supporters)
        for origin in look.origins:
            if self.trust.note(origin, wrong=not right):
                log.warning("the device %s is quarantined: too much of what it shared was wrong", self.name_of(origin))
                for space in self._spaces.values():
                    space.evidence.forget(origin)

    def save(self) -> None:
        """Writes down what was learned about when to reuse."""
        with self._lock:
            for space in self._spaces.values():
                space.save()

    def close(self) -> None:
        self.save()
        self.memory.close()


def recall_evidence(path: Path, bound: float) -> Evidence:
    """What `Keeper.save` wrote; if it is missing or damaged, evidence starts anew."""
    try:
        return Evidence.from_bytes(path.read_bytes(), bound)
    except FileNotFoundError:
        return Evidence(bound)
    except (OSError, ProtocolError) as error:
        log.warning("%s: %s", path, error)
        return Evidence(bound)


def _kept_here(candidate: Candidate) -> list[int]:
    return [id for id in candidate.supporters if id >= 0]


def _what(near: Neighbour) -> tuple[bytes, bytes, int]:
    """Tells entries apart: who says that which token comes where."""
    return near.origin, near.key.tobytes(), near.token


def _likeliest(reply: Reply) -> tuple[int, float]:
    """The LLM's own choice, whatever was drawn from its distribution."""
    if len(reply.y_ids):
        best = int(reply.y_p.argmax())
        return int(reply.y_ids[best]), float(reply.y_p[best])
    return reply.tokens[0], reply.tokens_p[0]


def _neighbour(entry: Entry, key: Key, end: bytes) -> Neighbour:
    """An entry that is not in the own memory yet; its id is -1."""
    other = np.frombuffer(entry.key, np.int8)
    a, b = key.astype(np.float32), other.astype(np.float32)
    norms = math.sqrt(float(np.einsum("i,i", a, a)) * float(np.einsum("i,i", b, b)))
    similarity = float(np.einsum("i,i", a, b)) / norms if norms else 0.0
    return Neighbour(
        id=-1,
        similarity=similarity,
        tail=shared_tail(end, entry.tail),
        token=entry.token,
        p=entry.p,
        count=entry.count,
        trust=1.0,
        origin=entry.origin,
        key=other,
    )
