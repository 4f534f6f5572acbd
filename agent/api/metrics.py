"""What Prometheus is told (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.adapt.assemble import Adaptation
from agent.adapt.federation import EVENTS as ADAPTER_EVENTS
from agent.agent import Account, Event, Piece
from agent.api.answer import is_token
from agent.device import Device
from agent.learn.federation import EVENTS, Federation
from agent.learn.learner import Learner
from agent.memory.keeper import Keeper
from agent.peers.network import Network
from protocol.errors import StoreError

_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_REQUEST_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_U = tuple(tenth / 10 for tenth in range(1, 11))
_ASKED = ("asked", "helped", "audited", "nothing", "late", "spared")
_ANSWERED = ("answered", "nothing")


class _State(Collector):
    """Numbers that somebody else keeps, read when they are asked for."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def collect(self) -> Iterator[Metric]:
        device = self._device
        yield from _agent(device)
        if device.adaptation is not None:
            yield from _adapting(device.adaptation)
        if device.keeper is not None:
            yield from _memory(device.keeper)
        if device.network is not None:
            yield from _peers(device.network)
        yield _gauge("policy_threshold", "Help is asked for when u is above it.", device.agent.options.policy.threshold)
        if device.learner is not None:
            yield from _learning(device.learner)
        if device.federation is not None:
            yield from _rounds(device.federation)


def _agent(device: Device) -> Iterator[Metric]:
    agent, cloud = device.agent, device.cloud
    yield _gauge("active_requests", "Answers that are being written.", agent.scheduler.active)
    yield _gauge("queued_requests", "Answers that wait for a place.", agent.scheduler.queued)
    yield _gauge("engine_threads", "Threads that the engine uses at present.", agent.engine.threads)
    yield _gauge("cloud_connected", "1 while the link to the cloud stands.", bool(cloud and cloud.link))
    breaker_open = bool(cloud and cloud.breaker.state != "closed")
    yield _gauge("breaker_open", "1 while the cloud is not asked because it failed.", breaker_open)
    late = cloud.late_replies if cloud else 0
    yield _counter("late_replies", "Replies that came after their deadline.", late)
    nonsense = cloud.protocol_errors if cloud else 0
    yield _counter("protocol_errors", "Connections ended by a malformed frame.", nonsense)
    opened = cloud.breaker.opened if cloud else 0
    yield _counter("breaker_openings", "How often the cloud was given up for a while.", opened)
    yield _gauge("adapters", "Adapters that requests may be written with.", len(agent.shelf.entries))


def _memory(keeper: Keeper) -> Iterator[Metric]:
    counts, (rate, bound) = keeper.counts, keeper.evidence.wrong_reuse_rate
    stats = keeper.memory.stats()
    yield _gauge("memory_entries", "Entries in the memory.", stats.entries)
    yield _gauge("memory_bytes", "Bytes that the memory takes on disk.", stats.disk_bytes)
    yield _gauge("memory_threshold", "Least score of a hit, theta.", keeper.evidence.theta)
    yield _gauge("memory_wrong_reuse", "Share of hits that differ from what the LLM says, estimated by audits.", rate)
    yield _gauge("memory_wrong_reuse_bound", "Upper 95 % confidence bound of that share.", bound)
    refused = "Devices whose entries are not used because too many were wrong."
    yield _gauge("memory_quarantined", refused, stats.quarantined)
    yield _counter("memory_lookups", "Steps that were looked up.", counts["lookups"])
    yield _counter("memory_hits", "Steps that the own memory answered.", counts["hits"])
    audits = CounterMetricFamily(
        "skerry_memory_audits", "Hits that the cloud was asked about as well, by outcome.", labels=["outcome"]
    )
    for outcome in ("right", "wrong"):
        audits.add_metric([outcome], counts[f"audits {outcome}"])
    yield audits
    changes = CounterMetricFamily("skerry_memory_events", "What happened in the memory, by kind.", labels=["kind"])
    for kind, count in {**asdict(stats.counts), "write_errors": stats.write_errors}.items():
        changes.add_metric([kind], count)
    yield changes


def _learning(learner: Learner) -> Iterator[Metric]:
    own, ledger = learner.own, learner.ledger
    yield _gauge(
        "policy_own_threshold", "The threshold that the device would have by its own data alone.", own.threshold
    )
    yield _gauge("policy_evidence", "Escalations and audits that this rests on, those near it.", own.evidence)
    yield _counter("ledger_errors", "Times that the disk refused the ledger.", ledger.errors)
    yield _counter("ledger_refused", "Steps that made no sense and were not noted.", ledger.refused)


def _rounds(federation: Federation) -> Iterator[Metric]:
    yield _gauge("round_answered", "The last round that the device took part in.", federation.answered)
    yield _gauge("policy_number", "Number of what the cluster agreed on last.", federation.number)
    events = CounterMetricFamily("skerry_round_events", "What happened in rounds, by kind.", labels=["kind"])
    for kind in EVENTS:
        events.add_metric([kind], federation.counts[kind])
    yield events


def _adapting(adaptation: Adaptation) -> Iterator[Metric]:
    lessons, status, federation = adaptation.collector.lessons, adaptation.adapting.status, adaptation.federation
    with suppress(StoreError):  # the disk's trouble; the rest is told all the same
        yield _gauge("lessons", "Lessons that are kept.", lessons.count)
    yield _counter("lessons_refused", "Answers of which no lesson could be made.", adaptation.collector.refused)
    yield _gauge("training", "1 while an adapter is trained or judged.", status.doing in ("training", "judging"))
    yield _counter("trainings", "Trainings that ended.", status.trainings)
    yield _counter("adapters_committed", "Adapters that passed the gate.", status.committed)
    if federation is not None:
        yield _gauge(
            "adapter_number", "Number of the adapters that the cluster agreed on last.", federation.past.number
        )
        events = CounterMetricFamily(
            "skerry_adapter_events", "What happened in rounds of adapters, by kind.", labels=["kind"]
        )
        for kind in ADAPTER_EVENTS:
            events.add_metric([kind], federation.counts[kind])
        yield events
        volume = CounterMetricFamily(
            "skerry_adapter_bytes", "Bytes of adapters' files, by direction.", labels=["direction"]
        )
        volume.add_metric(["up"], federation.bytes_up)
        volume.add_metric(["down"], federation.bytes_down)
        yield volume


def _peers(network: Network) -> Iterator[Metric]:
    transport, outbox = network.transport, network.outbox
    yield _gauge("broker_connected", "1 while the link to the broker stands.", transport.connected)
    others = sum(seen.name != network.me for seen in network.around.roster.online())
    yield _gauge("peers_online", "Other devices of the cluster that are online.", others)
    yield _gauge("outbox_messages", "Messages that wait for the broker.", outbox.waiting)
    dropped = outbox.dropped_old + outbox.dropped_full
    yield _counter("outbox_disk_errors", "Times that the disk refused the outbox.", outbox.disk_errors)
    yield _counter("outbox_dropped", "Messages that grew too old or did not fit.", dropped)
    yield _counter("gossip_sent", "Entries that were given to the cluster.", network.gossip.sent)
    yield _counter("gossip_dropped", "Entries that the rate limit held back.", network.gossip.dropped)
    volume = CounterMetricFamily("skerry_broker_bytes", "Bytes of MQTT messages, by direction.", labels=["direction"])
    volume.add_metric(["up"], transport.bytes_up)
    volume.add_metric(["down"], transport.bytes_down)
    yield volume
    heard = CounterMetricFamily(
        "skerry_peer_entries", "Entries that came from other devices, by verdict.", labels=["verdict"]
    )
    for verdict, count in list(network.intake.counts.items()):
        heard.add_metric([str(verdict)], count)
    yield heard
    yield _counts("peer_questions", "Questions to peers, by outcome.", network.resolver.counts, _ASKED)
    yield _counts("peer_answers", "Answers to questions of peers, by outcome.", network.answerer.counts, _ANSWERED)
    yield _dropped(network)
    refused = "Subscriptions that the broker's access list refused."
    yield _counter("broker_refused_subscriptions", refused, transport.subscriptions_refused)
    rekeyed = "How often a device of the cluster announced another key."
    yield _counter("peers_rekeyed", rekeyed, network.around.roster.rekeyed)


def _counts(name: str, meaning: str, counts: Mapping[str, int], outcomes: Sequence[str]) -> Metric:
    family = CounterMetricFamily(f"skerry_{name}", meaning, labels=["outcome"])
    for outcome in outcomes:
        family.add_metric([outcome], counts.get(outcome, 0))
    return family


def _dropped(network: Network) -> Metric:
    transport, around, roster = network.transport, network.around, network.around.roster
    family = CounterMetricFamily(
        "skerry_broker_dropped", "MQTT messages that were dropped, by kind and reason.", labels=["kind", "reason"]
    )
    dropped: dict[str, Mapping[str, int]] = {
        "any": {
            "malformed": transport.malformed,
            "oversized": transport.oversized,
            "error": transport.handler_errors,
        },
        "status": {
            "malformed": roster.malformed,
            "version": roster.newer,
            "stale": roster.stale,
            "crowded": roster.crowded,
            "new_key": roster.unbelieved,
        },
        "directory": {"malformed": around.malformed, "version": around.newer},
        "ask": {reason: network.answerer.counts[reason] for reason in ("malformed", "version", "flood", "duplicate")},
        "answer": {reason: network.resolver.counts[reason] for reason in ("malformed", "version", "unasked")},
    }
    for kind, reasons in dropped.items():
        for reason, count in reasons.items():
            family.add_metric([kind, reason], count)
    return family


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"skerry_{name}", meaning, value)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"skerry_{name}", meaning, value)


class Metrics:
    """Counters and histograms of one agent, on a registry of their own."""

    def __init__(self, device: Device) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(device))
        self._tokens = Counter(
            "skerry_tokens", "Tokens written, by provenance.", ["provenance"], registry=self.registry
        )
        self._llm_tokens = Counter("skerry_llm_tokens", "Tokens that the LLM computed.", registry=self.registry)
        self._bytes = Counter(
            "skerry_link_bytes",
            "Bytes between device and cloud, by direction.",
            ["direction"],
            registry=self.registry,
        )
        self._requests = Counter(
            "skerry_requests",
            "Requests, by endpoint and outcome.",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        self._adapted = Counter(
            "skerry_adapted",
            "Answers, by slot of the adapter that the SLM wrote with.",
            ["slot"],
            registry=self.registry,
        )
        self._first_token = Histogram(
            "skerry_first_token_seconds",
            "Time from a request to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._seconds = Histogram(
            "skerry_request_seconds",
            "Time from a request to the end of its answer.",
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self._uncertainty = Histogram(
            "skerry_uncertainty", "The SLM's uncertainty u per token.", buckets=_U, registry=self.registry
        )

    def request(self, endpoint: str, outcome: str) -> None:
        self._requests.labels(endpoint, outcome).inc()

    def note(self, event: Event) -> None:
        """One event of an answer; called on the engine's thread."""
        if isinstance(event, Piece) and is_token(event):
            self._uncertainty.observe(event.token.u)
        elif isinstance(event, Account):
            self._account(event)

    def _account(self, account: Account) -> None:
        for provenance, count in account.counts.items():
            self._tokens.labels(provenance).inc(count)
        for slot in {used.slot for used in account.adapters} or {"none"}:
            self._adapted.labels(slot).inc()
        self._llm_tokens.inc(account.llm_tokens)
        self._bytes.labels("up").inc(account.bytes_up)
        self._bytes.labels("down").inc(account.bytes_down)
        self._seconds.observe(account.seconds)
        if account.tokens:
            self._first_token.observe(account.first_token)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
