"""What is trained: the factors of every matrix that changes, as views of one vector, and Adam on that vector."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agent.adapt.checkpoint import Arrays
from agent.adapt.noise import frozen_a
from agent.adapt.recipe import Recipe
from agent.adapt.torch_model import Base, Low
from models.adapter import Adapter, Factors
from protocol.errors import BadAdapter, TrainingError

Floats = NDArray[np.float32]

_BETAS = (0.9, 0.999)
_EPS = 1e-8


def beginning(base: Base, recipe: Recipe, start: Adapter | None) -> dict[str, Factors]:
    """The factors that training starts from: the recipe's matrices and all that `start` changes, at the recipe's rank
    and scale. What is new changes nothing yet: b = 0, and a drawn for its name and seed, or the frozen one that all
    devices share, its first rows alike whatever the rank. Raises TrainingError, BadAdapter."""
    if start is not None and start.model != base.fingerprint:
        raise BadAdapter("training cannot start from an adapter that was made for another model file")
    first = max(0, len(base.layers) - recipe.layers) if recipe.layers else 0
    names = {f"blk.{n}.{kind}" for n in range(first, len(base.layers)) for kind in recipe.modules}
    learned = start.factors if start else {}
    made = {}
    for name in sorted(names | learned.keys()):
        matrix = base.matrix(name)
        if matrix is None:
            raise TrainingError(f"the model has no matrix {name} to adapt: adapt.modules names others")
        d_out, d_in = matrix.weight.shape
        a = frozen_a(base.fingerprint, name, recipe.rank, d_in) if recipe.freeze_a else _drawn(name, recipe, d_in)
        made[name] = Factors(a, np.zeros((d_out, recipe.rank), np.float32))
        if start and name in learned:
            scale = start.alpha / len(learned[name].a) / (recipe.alpha / recipe.rank)
            put = rescaled if recipe.freeze_a else resized
            made[name] = put(learned[name], scale, made[name])
    return made


def _drawn(name: str, recipe: Recipe, d_in: int) -> Floats:
    random = np.random.default_rng([recipe.seed, zlib.crc32(name.encode())])
    bound = d_in**-0.5  # as peft draws it: Kaiming's uniform with a = sqrt(5)
    return random.uniform(-bound, bound, (recipe.rank, d_in)).astype(np.float32)


def rescaled(learned: Factors, scale: float, fresh: Factors) -> Factors:
    """scale * b with the frozen a of `fresh`, as many columns of it as both have. Raises BadAdapter."""
    both = _both(learned, fresh)
    if not np.array_equal(learned.a[:both], fresh.a[:both]):
        raise BadAdapter("training with a frozen A cannot start from an adapter of another A")
    b = fresh.b.copy()
    b[:, :both] = np.float32(scale) * learned.b[:, :both]
    return Factors(fresh.a, b)


def _both(learned: Factors, fresh: Factors) -> int:
    if learned.a.shape[1] != fresh.a.shape[1] or len(learned.b) != len(fresh.b):
        raise BadAdapter("an adapter to start from has a matrix of another shape than the model")
    return min(len(learned.a), len(fresh.a))


def resized(learned: Factors, scale: float, fresh: Factors) -> Factors:
    """scale * b @ a at the rank of `fresh`: exact where that is no smaller (the rest stays as drawn, and changes
    nothing), else the nearest by SVD, without forming the product. Raises BadAdapter."""
    _both(learned, fresh)
    r, rank = len(learned.a), len(fresh.a)
    if r <= rank:
        a, b = fresh.a.copy(), fresh.b.copy()
        a[:r], b[:, :r] = learned.a, scale * learned.b
        return Factors(a, b)
    left, upper = np.linalg.qr(learned.b)
    right, lower = np.linalg.qr(learned.a.T)
    u, s, v = np.linalg.svd(upper @ lower.T)
    root = np.sqrt(s[:rank])
    return Factors((root[:, None] * v[:rank]) @ right.T, left @ (u[:, :rank] * root * scale))


class Trained:
    """`lows`: the changes to put on the model, by name; their factors and gradients are views of one vector each."""

    def __init__(self, factors: dict[str, Factors], recipe: Recipe) -> None:
        learning = [(name, half) for name in factors for half in ("b" if recipe.freeze_a else "ab")]
        start = [torch.from_numpy(getattr(factors[name], half)) for name, half in learning]
        self._values = torch.cat([tensor.reshape(-1) for tensor in start])
        self._grads = torch.zeros_like(self._values)
        self._means = torch.zeros_like(self._values)
        self._squares = torch.zeros_like(self._values)
        self._updates = 0
        leaves: dict[tuple[str, str], Tensor] = {}
        at = 0
        for key, tensor in zip(learning, start, strict=True):
            leaf = self._values[at : at + tensor.numel()].view(tensor.shape).requires_grad_()
            leaf.grad = self._grads[at : at + tensor.numel()].view(tensor.shape)
            leaves[key] = leaf
            at += tensor.numel()
        scale = recipe.alpha / recipe.rank
        self.lows = {
            name: Low(leaves.get((name, "a"), torch.from_numpy(f.a)), leaves[name, "b"], scale)
            for name, f in factors.items()
        }

    def forget_gradients(self) -> None:
        self._grads.zero_()

    def norm(self) -> float:
        """Of the gradient, all matrices together."""
        return float(self._grads.norm())

    def update(self, rate: float, shrink: float) -> None:
        """One step of Adam (Kingma and Ba, 2015), with the gradient times `shrink`."""
        self._updates += 1
        grads = self._grads.mul_(shrink)
        self._means.lerp_(grads, 1 - _BETAS[0])
        self._squares.lerp_(grads.square(), 1 - _BETAS[1])
        means = self._means / (1 - _BETAS[0] ** self._updates)
        squares = self._squares / (1 - _BETAS[1] ** self._updates)
        self._values.sub_(means.div_(squares.sqrt_().add_(_EPS)), alpha=rate)

    def factors(self) -> dict[str, Factors]:
        return {
            name: Factors(low.a.detach().numpy().copy(), low.b.detach().numpy().copy())
            for name, low in self.lows.items()
        }

    def state(self) -> Arrays:
        return {
            "values": self._values.numpy(),
            "means": self._means.numpy(),
            "squares": self._squares.numpy(),
            "updates": np.array(self._updates),
        }

    def restore(self, arrays: Arrays) -> None:
        for name, tensor in (("values", self._values), ("means", self._means), ("squares", self._squares)):
            tensor.copy_(torch.from_numpy(arrays[name]))
        self._updates = int(arrays["updates"])
