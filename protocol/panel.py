"""Whom to ask, where many could know but only a few should have to answer."""

from __future__ import annotations

from collections.abc import Sequence

_MEMORY = 16  # questions that a judgement looks back on
_PATIENCE = 3  # questions in a row without any answer, after which somebody counts as deaf
_PROBE = 16  # of so many questions one also goes to somebody deaf
_MOST = 1024  # names remembered


class Panel:
    """The most helpful ones are asked, and one place goes round among the others, so that a newcomer gets its chance.
    Not thread-safe."""

    def __init__(self) -> None:
        self._help: dict[str, float] = {}  # share of questions that it helped with, exponentially forgotten
        self._silent: dict[str, int] = {}
        self._turn = 0

    def choose(self, names: Sequence[str], most: int) -> list[str]:
        """At most `most` of `names`; those who never answer only now and then."""
        self._turn += 1
        listening = [name for name in names if self._silent.get(name, 0) < _PATIENCE]
        if self._turn % _PROBE == 0 or not listening:
            deaf = [name for name in names if name not in listening]
            listening += deaf[(self._turn // _PROBE) % len(deaf) :][:1] if deaf else []
        if len(listening) <= most:
            return listening
        ranked = sorted(listening, key=lambda name: -self._help.get(name, 0.0))
        others = sorted(ranked[most - 1 :])
        return [*ranked[: most - 1], others[self._turn % len(others)]]

    def answered(self, name: str, *, helped: bool) -> None:
        self._silent.pop(name, None)
        if name not in self._help and len(self._help) >= _MOST:
            del self._help[next(iter(self._help))]
        before = self._help.get(name, 0.0)
        self._help[name] = before + (helped - before) / _MEMORY

    def silent(self, name: str) -> None:
        if name not in self._silent and len(self._silent) >= _MOST:
            del self._silent[next(iter(self._silent))]
        self._silent[name] = self._silent.get(name, 0) + 1
