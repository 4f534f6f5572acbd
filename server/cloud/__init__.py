"""The cloud resolver: a large model that answers single tokens."""
