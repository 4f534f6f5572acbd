"""What an adapter changes, Delta W = (alpha / r) B A of each matrix, computed from its factors.

- `Sum`: a weighted sum of many changes of one matrix. It is kept as stacked factors up to a rank, and as the matrix
  from there on. For a truncation that rank is `breakeven`, from which on the factors take more room than the matrix.
  (For d_out = d_in = d that is d / 2, where decomposing the matrix begins to take less time, too.)
- Truncation: the best approximation of a rank (Eckart and Young 1936), one decomposition for all ranks. Of stacked
  factors B A: QR of B and of A^T, and the SVD of the R x R core between them. Of the matrix M: eigenvectors of its
  smaller Gram matrix in float64, several times as fast as an SVD. Directions below 1e-7 of the largest are lost in
  that; the files hold float16.
- `Sketcher`: a change in a few dimensions, (L B) (A R) of each matrix with random signs L and R (Johnson and
  Lindenstrauss 1984, on both sides). Inner products of sketches are those of the changes, with an error of a few
  percent of the norms, the smaller the more matrices there are. Exact ones cost the square of the sum of all ranks: for
  100 adapters more than the aggregation itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.adapter import Adapter, Factors, Floats

Doubles: TypeAlias = NDArray[np.float64]
Shape: TypeAlias = tuple[int, int]  # (d_out, d_in)
Sketch: TypeAlias = dict[str, Factors]  # by matrix, alpha / r in b: (r, _SKETCH) and (_SKETCH, r)

_PENDING = 64  # columns that are multiplied at once: fewer would wait for memory
_NOTHING = 1e-6  # of the largest singular value; what is below is rounding
_SKETCH = 24


def scale(adapter: Adapter, factors: Factors) -> float:
    """alpha / r of one of its matrices."""
    return adapter.alpha / factors.rank


def shape(factors: Factors) -> Shape:
    return factors.b.shape[0], factors.a.shape[1]


def norm(adapter: Adapter) -> float:
    """||Delta W||_F over all matrices together."""
    return float(np.sqrt(max(inner(adapter, adapter), 0.0)))


def inner(one: Adapter, other: Adapter) -> float:
    """<Delta W, Delta W'> over the matrices that both change: tr((B'^T B) (A A'^T))."""
    total = 0.0
    for name, mine in one.factors.items():
        theirs = other.factors.get(name)
        if theirs is not None:
            ins = mine.a.astype(np.float64) @ theirs.a.T.astype(np.float64)
            outs = mine.b.T.astype(np.float64) @ theirs.b.astype(np.float64)
            total += scale(one, mine) * scale(other, theirs) * float((ins * outs).sum())
    return total


def breakeven(shape: Shape) -> int:
    """The least R with R (d_out + d_in) >= d_out d_in."""
    return -(-shape[0] * shape[1] // sum(shape))


class Sum:
    """sum of b_k @ a_k of one matrix (d_out, d_in), as stacked factors while its rank is below `stacked`."""

    def __init__(self, shape: Shape, stacked: int) -> None:
        self._shape = shape
        self._b: list[Floats] = []
        self._a: list[Floats] = []
        self._dense: Floats | None = None
        self._rank = 0  # of what is stacked
        self._widest = stacked

    @property
    def nbytes(self) -> int:
        return 4 * self._rank * sum(self._shape) + (0 if self._dense is None else self._dense.nbytes)

    def add(self, b: Floats, a: Floats) -> None:
        """(d_out, r), (r, d_in). They are kept, not copied. Raises ValueError if they don't fit."""
        if (b.shape[0], a.shape[1]) != self._shape or b.shape[1] != a.shape[0]:
            raise ValueError(f"factors {b.shape} and {a.shape} don't make a matrix of {self._shape}")
        self._b.append(b)
        self._a.append(a)
        self._rank += a.shape[0]
        if self._rank >= (self._widest if self._dense is None else _PENDING):
            self._fold()

    def stacked(self) -> tuple[Floats, Floats]:
        """(d_out, R), (R, d_in), whose product is the sum exactly."""
        if self._dense is None:
            return np.concatenate(self._b, axis=1), np.concatenate(self._a, axis=0)
        self._fold()
        d_out, d_in = self._shape
        if d_out <= d_in:
            return np.eye(d_out, dtype=np.float32), self._dense
        return self._dense, np.eye(d_in, dtype=np.float32)

    def truncated(self, rank: int) -> tuple[Floats, Floats]:
        """(d_out, k), (k, d_in): sqrt(S) on both sides, in falling order, so that the first r of them are the best
        approximation of rank r for every r. k <= rank: what the sum really has, but at least 1."""
        if self._dense is None:
            left, values, right = _of_factors(*self.stacked())
        else:
            self._fold()
            left, values, right = _of_matrix(self._dense, rank)
        kept = min(rank, max(1, int((values > _NOTHING * values[0]).sum())))
        roots = np.sqrt(values[:kept])
        b, a = left[:, :kept] * roots, roots[:, None] * right[:kept]
        return b.astype(np.float32), a.astype(np.float32)

    def _fold(self) -> None:
        if not self._b:
            return
        product = np.concatenate(self._b, axis=1) @ np.concatenate(self._a, axis=0)
        if self._dense is None:
            self._dense = product
        else:
            self._dense += product
        self._b, self._a, self._rank = [], [], 0


def _of_factors(b: Floats, a: Floats) -> tuple[Doubles, Doubles, Doubles]:
    """U, S, V^T of b @ a."""
    outer, left = np.linalg.qr(b.astype(np.float64))
    inner_, right = np.linalg.qr(a.T.astype(np.float64))
    u, values, vt = np.linalg.svd(left @ right.T)
    return outer @ u, values, vt @ inner_.T


def _of_matrix(matrix: Floats, rank: int) -> tuple[Doubles, Doubles, Doubles]:
    """The first U, S, V^T, at most `rank`. With V from M^T M, M V = U S has the exact product whatever V's error."""
    m = matrix.astype(np.float64)
    wide = m.shape[0] < m.shape[1]
    m = m.T if wide else m
    v = np.linalg.eigh(m.T @ m)[1][:, ::-1][:, :rank]
    us = m @ v
    values = np.linalg.norm(us, axis=0)
    u = us / np.maximum(values, np.finfo(np.float64).tiny)
    return (v, values, u.T) if wide else (u, values, v.T)


class Sketcher:
    """Adapters as sketches. Those of one seed can be compared."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._signs: dict[tuple[str, Shape], tuple[Floats, Floats]] = {}

    def __call__(self, adapter: Adapter) -> Sketch:
        sketch = {}
        for name, factors in adapter.factors.items():
            left, right = self._of(name, shape(factors))
            sketch[name] = Factors(factors.a @ right, np.float32(scale(adapter, factors)) * (left @ factors.b))
        return sketch

    def _of(self, name: str, shape: Shape) -> tuple[Floats, Floats]:
        """(_SKETCH, d_out), (d_in, _SKETCH)"""
        if (name, shape) not in self._signs:
            random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
            left, right = (
                (random.integers(0, 2, size, np.int8) * 2 - 1).astype(np.float32) / np.float32(_SKETCH**0.5)
                for size in ((_SKETCH, shape[0]), (shape[1], _SKETCH))
            )
            self._signs[name, shape] = left, right
        return self._signs[name, shape]


def gram(sketches: Sequence[Sketch], rank: int | None = None) -> Doubles:
    """(n, n): inner products of the changes, or of their first `rank` rows and columns alone."""
    products = np.zeros((len(sketches), len(sketches)))
    for name in sorted(set().union(*sketches)):
        rows = np.zeros((len(sketches), _SKETCH * _SKETCH))
        for row, sketch in zip(rows, sketches, strict=True):
            if name in sketch:
                row[:] = (sketch[name].b[:, :rank] @ sketch[name].a[:rank]).ravel()
        products += rows @ rows.T
    return products
