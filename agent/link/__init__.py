"""The device on the broker: identity, presence, and an outbox that survives power cuts."""
