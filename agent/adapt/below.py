"""What the layers below the lowest adapted one make of a lesson: the same in every epoch, so it is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from agent.adapt.hardware import KEPT_BELOW
from agent.adapt.prepare import Example
from agent.adapt.torch_model import Base, padded

_MULTIPLE = 32  # tokens: torch keeps compiled kernels for each length that it has met, some megabytes each


class Below:
    """Up to KEPT_BELOW bytes are kept; what goes beyond is computed anew each time. `changed`: names of the adapted
    matrices."""

    def __init__(self, base: Base, changed: Iterable[str]) -> None:
        self.first = min(int(name.split(".")[1]) for name in changed)
        self._base = base
        self._kept: dict[int, Tensor] = {}  # by the example's identity: each lives as long as the training
        self._room = KEPT_BELOW if self.first else 0

    def states(self, parts: Sequence[Example]) -> Tensor:
        """What layer `first` is given: (n, longest or a little more, width), filled up on the right."""
        found = [self._of(part) for part in parts]
        whole = found[0].new_zeros((len(found), _even(max(map(len, found))), found[0].shape[1]))
        for row, states in zip(whole, found, strict=True):
            row[: len(states)] = states
        return whole

    def _of(self, part: Example) -> Tensor:
        """Each lesson by itself, so that its states are the same bits whatever it comes together with."""
        if (kept := self._kept.get(id(part))) is not None:
            return kept
        with torch.no_grad():
            tokens = padded([part.tokens, [0] * _even(len(part.tokens))])[:1]
            states = self._base.through(self._base.embedded(tokens), 0, self.first)[0, : len(part.tokens)].clone()
        size = states.numel() * states.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[id(part)] = states
        return states


def _even(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE
