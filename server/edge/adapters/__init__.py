"""Many devices' adapters as one: which are sound (`robust`), who learned alike (`similar`), and the aggregate
(`strategies`), all of it on the factors (`delta`)."""

from server.edge.adapters.robust import screen
from server.edge.adapters.similar import groups
from server.edge.adapters.strategies import Contribution, Strategy, aggregate

__all__ = ["Contribution", "Strategy", "aggregate", "groups", "screen"]
