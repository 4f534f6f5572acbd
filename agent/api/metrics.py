"""What Prometheus is told (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.agent import Account, Agent, Event, Piece
from agent.api.answer import is_token
from agent.cloud import CloudResolver

_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_REQUEST_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_U = tuple(tenth / 10 for tenth in range(1, 11))


class _State(Collector):
    """Numbers that somebody else keeps, read when they are asked for."""

    def __init__(self, agent: Agent, cloud: CloudResolver | None) -> None:
        self._agent = agent
        self._cloud = cloud

    def collect(self) -> Iterator[Metric]:
        agent, cloud = self._agent, self._cloud
        gauges = (
            ("skerry_active_requests", "Answers that are being written.", agent.scheduler.active),
            ("skerry_queued_requests", "Answers that wait for a place.", agent.scheduler.queued),
            ("skerry_engine_threads", "Threads that the engine uses at present.", agent.engine.threads),
            ("skerry_cloud_connected", "1 while the link to the cloud stands.", bool(cloud and cloud.link)),
            (
                "skerry_breaker_open",
                "1 while the cloud is not asked because it failed.",
                bool(cloud and cloud.breaker.state != "closed"),
            ),
        )
        for name, meaning, value in gauges:
            yield GaugeMetricFamily(name, meaning, value)
        late = cloud.late_replies if cloud else 0
        yield CounterMetricFamily("skerry_late_replies", "Replies that came after their deadline.", late)
        nonsense = cloud.protocol_errors if cloud else 0
        yield CounterMetricFamily("skerry_protocol_errors", "Connections ended by a malformed frame.", nonsense)
        opened = cloud.breaker.opened if cloud else 0
        yield CounterMetricFamily("skerry_breaker_openings", "How often the cloud was given up for a while.", opened)


class Metrics:
    """Counters and histograms of one agent, on a registry of their own."""

    def __init__(self, agent: Agent, cloud: CloudResolver | None) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(agent, cloud))
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
        self._llm_tokens.inc(account.llm_tokens)
        self._bytes.labels("up").inc(account.bytes_up)
        self._bytes.labels("down").inc(account.bytes_down)
        self._seconds.observe(account.seconds)
        if account.tokens:
            self._first_token.observe(account.first_token)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
