"""The coordinator of a fleet: it brings together what the clusters learned, and tells all of them."""
