"""How many weights a model has, however they are packed: of two models the one with more is taken to be the better.

Matrices alone are counted, and the one over the vocabulary once, whether the model stores it once or twice; so the
count is the same for one model in any format.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from models.gguf_header import Tensor
from models.onnx_header import OnnxGraph

_VOCABULARY = ("token_embd.weight", "output.weight")  # GGUF's names
_TABLES = "_cache"  # how names of sines and cosines end, which are no weights


def of_gguf(tensors: Iterable[Tensor]) -> int:
    matrices = {tensor.name: prod(tensor.shape) for tensor in tensors if len(tensor.shape) > 1}
    vocabulary = max(matrices.pop(name, 0) for name in _VOCABULARY)
    return vocabulary + sum(matrices.values())


def of_onnx(graph: OnnxGraph, vocab: int) -> int:
    """`vocab`: tokens that the model gives logits for."""
    shapes = {tensor.name: tensor.shape for tensor in graph.initializers}
    packed = {name for node in graph.blockwise for name in node.inputs}  # weights, scales and zero points
    matrices = [
        (shape, prod(shape))
        for name, shape in shapes.items()
        if len(shape) > 1 and name not in packed and not name.endswith(_TABLES)
    ]
    for node in graph.blockwise:
        shape = shapes.get(node.inputs[0], ()) if node.inputs else ()
        matrices.append((shape, node.values or prod(shape) * 8 // max(1, node.bits) if shape else 0))
    vocabulary = max((size for shape, size in matrices if vocab in shape), default=0)
    return vocabulary + sum(size for shape, size in matrices if vocab not in shape)
