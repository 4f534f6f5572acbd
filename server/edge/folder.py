"""What lies in the folder in which an edge keeps its rounds."""

DATABASE = "rounds.db"
LOCK = "edge.lock"
