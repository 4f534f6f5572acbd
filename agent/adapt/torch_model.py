"""The model of a GGUF file in torch: frozen, with low-rank changes on some of its matrices.

The very file that serves is read tensor by tensor into the type that is computed with, so that loading never takes
more than the weights themselves and one block of rows. Matrices keep the file's own row order: no conversion stands
between an adapter that is trained here and the one that llama.cpp attaches.

Architectures: llama and qwen2, decoders of the same build (pre-norm with RMSNorm, rotary positions, grouped queries,
SwiGLU), which differ in the pairs that are rotated (neighbours in llama's files, halves in qwen2's) and in biases.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from agent.adapt.gguf_tensors import Weights
from agent.adapt.hardware import ARCHITECTURES
from models.adapter import Adapter
from models.fingerprint import fingerprint
from protocol.errors import BadAdapter, TrainingError

Floats = NDArray[np.float32]

_PASS = 4096  # tokens of one pass without gradients
_MULTIPLE = 16  # of tokens, to which passes are padded: kernels are compiled for each length, some MB of them
_KERNELS = 128  # that are kept; torch's default is 1024, which for lessons of all lengths is hundreds of MB
_QUERIES = 256  # of attention, whose weights are in memory at once
_FASTER = 1.2  # times, for bfloat16 to be taken


@dataclass(frozen=True, slots=True)
class Low:
    """A low-rank change of one matrix: scale * b @ a, in float32. `a` (r, d_in), `b` (d_out, r)."""

    a: Tensor
    b: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.scale * self.b.to(x.dtype))


class Matrix:
    """y = x W^T + bias, and the change if there is one. `weight` (d_out, d_in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.change: Low | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.change is None else y + self.change(x)


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight, computed in float32; keeps only x for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return wide.mul(inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        unit = x.float().mul_(inverse)
        grad = grads[0].float().mul_(weight)
        along = (grad * unit).mean(-1, keepdim=True)
        return grad.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), None, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up; keeps only the two for the way back."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        silu = gate * s
        slope = silu.sub(1).neg_().mul_(s).add_(silu)  # silu' = s + silu (1 - s) = s (1 - silu) + silu
        return slope.mul_(up).mul_(grads[0]), silu.mul_(grads[0])


class Attention(torch.autograd.Function):
    """Causal attention with grouped queries; q (n, heads, length, width), k and v (n, kv heads, length, width).

    Keeps q, k and v, and computes the weights again on the way back, for _QUERIES at a time. torch's own way back takes
    two to four times as long in bfloat16; in float32 it is the faster one, and `attention` takes it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        n, kv, length, width = k.shape
        scale = width**-0.5
        q, grad = (part.reshape(n, kv, -1, length, width) for part in (q, grads[0]))  # those that share a key together
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for at in range(0, length, _QUERIES):
            end = min(at + _QUERIES, length)
            some, above = (
                q[:, :, :, at:end].reshape(n * kv, -1, width),
                grad[:, :, :, at:end].reshape(n * kv, -1, width),
            )
            later = torch.full((end - at, end), -math.inf, dtype=q.dtype).triu_(at + 1).repeat(q.shape[2], 1)
            p = torch.baddbmm(later, some, k[:, :end].mT, alpha=scale).softmax(-1)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(above, v[:, :end].mT), p, -1, p.dtype)
            dv[:, :end].baddbmm_(p.mT, above)
            dk[:, :end].baddbmm_(ds.mT, some, alpha=scale)
            dq[:, :, :, at:end] = torch.bmm(ds, k[:, :end]).mul_(scale).view(n, kv, -1, end - at, width)
        return dq.flatten(1, 2), dk.view(n, kv, length, width), dv.view(n, kv, length, width)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype == torch.bfloat16:
        return _applied(Attention, q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _applied(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    made: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return made


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: Tensor
    attn_q: Matrix
    attn_k: Matrix
    attn_v: Matrix
    attn_output: Matrix
    ffn_norm: Tensor
    ffn_gate: Matrix
    ffn_up: Matrix
    ffn_down: Matrix


MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class Rotary:
    """Rotary positions (Su et al., 2021). `pairs`: which dimensions of a head are rotated together."""

    def __init__(self, width: int, base: float, factors: Tensor | None, neighbours: bool) -> None:
        self._rates = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        if factors is not None:
            self._rates = self._rates / factors.double()
        self._neighbours = neighbours

    def angles(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (length, width / 2)."""
        angles = torch.outer(torch.arange(length, dtype=torch.float64), self._rates)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (..., length, width)."""
        if self._neighbours:
            a, b = x.view(*x.shape[:-1], -1, 2).unbind(-1)
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Base:
    """A model, frozen. Not for two threads at once.

    `context`: tokens it was made for; `vocab`; `width`: of a hidden state; `dtype`: of the weights.
    """

    def __init__(self, weights: Weights, fingerprint: str, dtype: torch.dtype) -> None:
        """Raises TrainingError if this is an architecture that cannot be trained, BadModelFile."""
        self.fingerprint = fingerprint
        self.architecture = weights.architecture
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise TrainingError(f"models of the architecture {self.architecture} cannot be trained: it knows {known}")
        self.dtype = dtype
        self.context: int = weights.value("context_length")
        self.width: int = weights.value("embedding_length")
        self._heads: int = weights.value("attention.head_count")
        self._kv_heads: int = weights.value("attention.head_count_kv", self._heads)
        self._eps: float = weights.value("attention.layer_norm_rms_epsilon")
        head = weights.value("attention.key_length", self.width // self._heads)
        if weights.value("rope.dimension_count", head) != head:
            raise TrainingError("models that rotate a part of each head cannot be trained")
        factors = self._vector(weights, "rope_freqs.weight") if "rope_freqs.weight" in weights else None
        base = weights.value("rope.freq_base", 10_000.0)
        self._rotary = Rotary(head, base, factors, neighbours=self.architecture == "llama")
        self._embedding = self._tensor(weights, "token_embd.weight")
        self.vocab = len(self._embedding)
        self._output = self._tensor(weights, "output.weight") if "output.weight" in weights else self._embedding
        self._norm = self._vector(weights, "output_norm.weight")
        self.layers = [self._layer(weights, f"blk.{n}") for n in range(weights.value("block_count"))]

    @classmethod
    def load(cls, path: Path, threads: int, bfloat16: bool | None = None) -> Base:
        """`bfloat16` None: whichever type this processor is faster with, measured. Sets torch's threads. Raises
        TrainingError, BadModelFile."""
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))
        torch.set_num_threads(threads)
        weights = Weights(path)
        if bfloat16 is None:
            bfloat16 = faster_in_bfloat16()
        return cls(weights, fingerprint(path), torch.bfloat16 if bfloat16 else torch.float32)

    def _layer(self, weights: Weights, name: str) -> Layer:
        return Layer(
            attn_norm=self._vector(weights, f"{name}.attn_norm.weight"),
            ffn_norm=self._vector(weights, f"{name}.ffn_norm.weight"),
            **{kind: self._matrix(weights, f"{name}.{kind}") for kind in MATRICES},
        )

    def _matrix(self, weights: Weights, name: str) -> Matrix:
        bias = f"{name}.bias"
        return Matrix(
            self._tensor(weights, f"{name}.weight"),
            self._vector(weights, bias).to(self.dtype) if bias in weights else None,
        )

    def _tensor(self, weights: Weights, name: str) -> Tensor:
        filled = torch.empty(weights.shape(name), dtype=self.dtype)
        for at, rows in weights.blocks(name):
            filled[at : at + len(rows)] = torch.from_numpy(rows)
        return filled

    @staticmethod
    def _vector(weights: Weights, name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([rows for _, rows in weights.blocks(name)]))

    def matrix(self, name: str) -> Matrix | None:
        """By its name in the file without ".weight", such as blk.3.attn_q; None if there is none of that name."""
        _, _, rest = name.partition("blk.")
        number, _, kind = rest.partition(".")
        if kind not in MATRICES or not number.isdecimal() or int(number) >= len(self.layers):
            return None
        found: Matrix = getattr(self.layers[int(number)], kind)
        return found

    @contextmanager
    def changed(self, changes: Mapping[str, Low]) -> Iterator[None]:
        """The model with these changes of its matrices, and without any afterwards. Raises BadAdapter."""
        try:
            for name, change in changes.items():
                matrix = self.matrix(name)
                if matrix is None or matrix.weight.shape != (len(change.b), change.a.shape[1]):
                    raise BadAdapter(f"the adapter changes {name}, which this model does not have in that shape")
                matrix.change = change
            yield
        finally:
            for name in changes:
                if matrix := self.matrix(name):
                    matrix.change = None

    def wearing(self, adapter: Adapter | None) -> Any:
        """As `changed`, of an adapter. Raises BadAdapter if it is for another model."""
        if adapter is None:
            return self.changed({})
        if adapter.model != self.fingerprint:
            raise BadAdapter("the adapter was made for another model file")
        return self.changed(
            {
                name: Low(torch.from_numpy(f.a), torch.from_numpy(f.b), adapter.alpha / len(f.a))
                for name, f in adapter.factors.items()
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states (n, length, width) of tokens (n, length), before the last norm. Rows may be padded on the
        right: a token sees only those before it."""
        return self.through(self.embedded(tokens), 0, len(self.layers))

    def embedded(self, tokens: Tensor) -> Tensor:
        """(n, length, width): what the lowest layer is given."""
        return self._embedding[tokens]

    def through(self, h: Tensor, first: int, end: int) -> Tensor:
        """What the layers from `first` to before `end` make of hidden states (n, length, width)."""
        cos, sin = self._rotary.angles(h.shape[1], self.dtype)
        for layer in self.layers[first:end]:
            h = h + self._attention(layer, _applied(RmsNorm, h, layer.attn_norm, self._eps), cos, sin)
            inner = _applied(RmsNorm, h, layer.ffn_norm, self._eps)
            h = h + layer.ffn_down(_applied(SwiGlu, layer.ffn_gate(inner), layer.ffn_up(inner)))
        return h

    def _attention(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = layer.attn_q(x).view(n, length, self._heads, -1).transpose(1, 2)
        k = layer.attn_k(x).view(n, length, self._kv_heads, -1).transpose(1, 2)
        v = layer.attn_v(x).view(n, length, self._kv_heads, -1).transpose(1, 2)
        q, k = self._rotary(q, cos, sin), self._rotary(k, cos, sin)
        return layer.attn_output(attention(q, k, v).transpose(1, 2).flatten(-2))

    def final(self, h: Tensor) -> Tensor:
        """The last norm."""
        return _applied(RmsNorm, h, self._norm, self._eps)

    def logits(self, normed: Tensor) -> Tensor:
        """(..., vocab) float32."""
        return F.linear(normed, self._output).float()

    def head(self, ids: Sequence[int]) -> Floats:
        """Rows of the output layer: (len(ids), width). A state's inner product with one is that token's logit."""
        return self._output[torch.tensor(list(ids))].float().numpy()


def states(base: Base, adapter: Adapter | None, contexts: Sequence[Sequence[int]]) -> Floats:
    """The last hidden state after the last norm at the end of each context, what llama.cpp gives as its embedding:
    (n, width). Raises BadAdapter."""
    made = np.empty((len(contexts), base.width), np.float32)
    with torch.inference_mode(), base.wearing(adapter):
        for rows in grouped([len(context) for context in contexts], _PASS):
            h = base.forward(padded([contexts[row] for row in rows]))
            ends = torch.tensor([len(contexts[row]) - 1 for row in rows])
            made[rows] = base.final(h[torch.arange(len(rows)), ends]).float().numpy()
    return made


def states_all(base: Base, adapter: Adapter | None, tokens: Sequence[int]) -> Floats:
    """As `states`, after each token of one text: (len(tokens), width)."""
    with torch.inference_mode(), base.wearing(adapter):
        return base.final(base.forward(padded([tokens]))[0, : len(tokens)]).float().numpy()


def distributions(base: Base, adapter: Adapter | None, contexts: Sequence[Sequence[int]], ids: Sequence[int]) -> Floats:
    """The next token's distribution cut to `ids`, after each context: (n, len(ids)), rows sum to 1."""
    logits = states(base, adapter, contexts) @ base.head(ids).T
    likely = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(likely / likely.sum(1, keepdims=True), np.float32)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(n, longest), filled up on the right with a token that nobody looks at."""
    longest = -(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE
    filled = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return filled


def grouped(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in groups of similar length, each at most `tokens` with its padding (or a single one)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def faster_in_bfloat16() -> bool:
    """Whether this processor multiplies matrices clearly faster in bfloat16 than in float32; takes a moment."""

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        best = math.inf
        for _ in range(8):
            begun = time.perf_counter()
            F.linear(x, w)
            best = min(best, time.perf_counter() - begun)
        return best

    with torch.inference_mode():
        return seconds(torch.float32) > _FASTER * seconds(torch.bfloat16)
