"""Topic names and filters as MQTT 3.1.1 defines them (section 4.7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_LONGEST = 65_535  # bytes of a string in MQTT


def check_topic(topic: str) -> None:
    """Raises ValueError for what can't be published to."""
    if not topic or "+" in topic or "#" in topic or "\0" in topic or len(topic.encode()) > _LONGEST:
        raise ValueError(f"not a topic name: {topic!r}")


def check_filter(filter: str) -> None:
    """Raises ValueError for what can't be subscribed to."""
    levels = filter.split("/")
    wrong = any(("+" in level or "#" in level) and len(level) > 1 for level in levels) or "#" in levels[:-1]
    if not filter or wrong or "\0" in filter or len(filter.encode()) > _LONGEST:
        raise ValueError(f"not a topic filter: {filter!r}")


class _Node(Generic[T]):
    __slots__ = ("children", "value")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.value: T | None = None


class FilterTree(Generic[T]):
    """One value per filter; finds those whose filter matches a topic in time that does not grow with their number."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()

    def get(self, filter: str) -> T | None:
        node: _Node[T] | None = self._root
        for level in filter.split("/"):
            node = node.children.get(level) if node else None
        return node.value if node else None

    def put(self, filter: str, value: T) -> None:
        node = self._root
        for level in filter.split("/"):
            node = node.children.setdefault(level, _Node())
        node.value = value

    def matching(self, topic: str) -> Iterator[T]:
        """A wildcard does not stand for a first level that begins with `$`; `a/#` matches `a` as well."""
        levels = topic.split("/")
        nodes = [self._root]
        for depth, level in enumerate(levels):
            wild = depth > 0 or not topic.startswith("$")
            below: list[_Node[T]] = []
            for node in nodes:
                if wild and (rest := node.children.get("#")) and rest.value is not None:
                    yield rest.value
                steps = (level, "+") if wild else (level,)
                below += [child for step in steps if (child := node.children.get(step))]
            nodes = below
        for node in nodes:
            if (rest := node.children.get("#")) and rest.value is not None:
                yield rest.value
            if node.value is not None:
                yield node.value
