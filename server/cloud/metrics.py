"""What `/metrics` tells. Counts and times only, never content."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """One set of metrics per server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.connections = Gauge("skerry_serve_connections", "Connections open.", registry=registry)
        self.sessions = Gauge("skerry_serve_sessions", "Answers being written.", registry=registry)
        self.asks = Counter("skerry_serve_asks", "Asks received, by mode.", ["mode"], registry=registry)
        self.refusals = Counter("skerry_serve_refusals", "Refusals sent, by code.", ["code"], registry=registry)
        self.bad_frames = Counter(
            "skerry_serve_bad_frames", "Messages that ended their connection, by reason.", ["reason"], registry=registry
        )
        self.denied = Counter("skerry_serve_denied", "Requests without a valid key.", registry=registry)
        self.llm_tokens = Counter("skerry_serve_llm_tokens", "Tokens the LLM wrote.", registry=registry)
        self.burst_tokens = Counter("skerry_serve_burst_tokens", "Tokens sent as bursts.", registry=registry)
        self.received = Counter("skerry_serve_received_bytes", "Bytes of messages received.", registry=registry)
        self.sent = Counter("skerry_serve_sent_bytes", "Bytes of messages sent.", registry=registry)
        self.answer_seconds = Histogram(
            "skerry_serve_answer_seconds",
            "From an Ask's arrival to its Answer.",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=registry,
        )
