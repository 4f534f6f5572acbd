"""The agent's HTTP API: OpenAI-compatible, plus health and metrics."""
