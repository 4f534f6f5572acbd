"""The chain of help: own memory, then peers, then the cloud. Each is asked only what the one before it left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from agent.memory.keeper import Keeper, Look
from agent.peers.resolver import ENOUGH, Enough, PeerConversation, PeerResolver
from agent.resolver import Conversation, Provenance, Question, Reach, Reply, Resolver, Ticket, Traffic
from protocol.memory import Entry
from protocol.resolve import Message, Mode, Sampling


class Chain(Resolver):
    """Whoever is missing is left out: with neither peers nor cloud nothing leaves the device."""

    def __init__(self, keeper: Keeper, peers: PeerResolver | None = None, cloud: Resolver | None = None) -> None:
        self._keeper = keeper
        self._peers = peers
        self._cloud = cloud

    def open(
        self, prompt: Sequence[Message] | str, sampling: Sampling, mode: Mode, wake: Callable[[], None]
    ) -> ChainConversation:
        cloud = self._cloud.open(prompt, sampling, mode, wake) if self._cloud else None
        among_peers = Traffic()
        peers = self._peers.open(wake, among_peers) if self._peers else None
        return ChainConversation(self._keeper, peers, cloud, mode, among_peers)


@dataclass(slots=True)
class _Asked:
    """What an open ticket is about, and who has it; None: the own memory has answered. `look` is what is known so far,
    which a peer's answer may replace."""

    question: Question
    look: Look | None
    of: Conversation | PeerConversation | None


class ChainConversation(Conversation):
    def __init__(
        self,
        keeper: Keeper,
        peers: PeerConversation | None,
        cloud: Conversation | None,
        mode: Mode,
        among_peers: Traffic,
    ) -> None:
        self.traffic = cloud.traffic if cloud is not None else Traffic()
        self.alone = peers is None and cloud is None
        self.bursts = cloud is not None and cloud.bursts
        self._keeper = keeper
        self._peers = peers
        self._cloud = cloud
        self._mode = mode
        self._among_peers = among_peers
        self._looked: tuple[Question, Look] | None = None  # at the question that may be asked next
        self._asked: dict[Ticket, _Asked] = {}

    def known(self, question: Question) -> Ticket | None:
        look = None if question.audit else self._keeper.look(question, self._mode)
        if look is None:
            return None
        self._looked = (question, look)
        if look.audit and self._cloud is not None and question.reach is not Reach.NOBODY:
            return None
        return self._from_memory(question, look)

    def ask(self, question: Question) -> Ticket | None:
        look = self._looked[1] if self._looked and self._looked[0] is question else None
        self._looked = None
        if self._peers is not None and question.reach is Reach.ANYONE and look is not None and look.reply is None:
            asked = _Asked(question, look, self._peers)
            ticket = self._peers.ask(look.lookup, partial(self._judge, asked))
            if ticket is not None:
                ticket.last, ticket.near = False, True
                self._asked[ticket] = asked
                return ticket
        return self._ask_cloud(question, look)

    def _judge(self, asked: _Asked, entries: list[Entry]) -> Reply | Enough | None:
        """On the transport's thread: does a peer's answer do? The first hit decides, also if it is to be audited."""
        assert asked.look is not None
        found = self._keeper.judge(asked.question, asked.look, entries, self._mode)
        if found.reply is None:
            return None
        asked.look = found
        return ENOUGH if found.audit and self._cloud is not None else found.reply

    def _ask_cloud(self, question: Question, look: Look | None) -> Ticket | None:
        ticket = self._cloud.ask(question) if self._cloud is not None else None
        if ticket is None:
            return self._from_memory(question, look)
        ticket.last = look is None or look.reply is None
        self._asked[ticket] = _Asked(question, look, self._cloud)
        return ticket

    def _from_memory(self, question: Question, look: Look | None) -> Ticket | None:
        """The hit, if it is one: also where the cloud should have confirmed it, but did not."""
        if look is None or look.reply is None:
            return None
        ticket = Ticket(0.0, 0.0, reply=look.reply)
        self._asked[ticket] = _Asked(question, look, None)
        return ticket

    def again(self, ticket: Ticket) -> Ticket | None:
        asked = self._asked.pop(ticket)
        if asked.of is not None and not ticket.failed:
            asked.of.late(ticket)
        if asked.of is self._peers:
            return self._ask_cloud(asked.question, asked.look)
        return self._from_memory(asked.question, asked.look)

    def taken(self, ticket: Ticket) -> None:
        asked = self._asked.pop(ticket, None)
        if asked is None or ticket.reply is None:
            return
        if ticket.reply.provenance is Provenance.CLOUD:
            self._keeper.resolved(asked.question, asked.look, ticket.reply)
        elif asked.look is not None:
            self._keeper.used(asked.look, ticket.reply)

    def late(self, ticket: Ticket) -> None:
        asked = self._asked.pop(ticket, None)
        if asked is not None and asked.of is not None:
            asked.of.late(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        asked = self._asked.pop(ticket, None)
        if asked is not None and asked.of is not None:
            asked.of.withdraw(ticket)

    def close(self) -> None:
        self.traffic.peer_bytes_up = self._among_peers.bytes_up
        self.traffic.peer_bytes_down = self._among_peers.bytes_down
        for other in (self._peers, self._cloud):
            if other is not None:
                other.close()
