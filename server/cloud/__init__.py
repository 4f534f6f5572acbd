"""The cloud resolver: an LLM that helps devices with single tokens."""
