"""`python -m models.workshop.onnx_quantize FOLDER OUT KIND`: fewer bits for the matrices of an ONNX model.

Kinds. int4, mixed and int8 store weights in blocks of 32 along the inputs, each with a scale and a zero point
(MatMulNBits); products are of 8-bit integers, activations being rounded block by block on the fly. The output layer has
8 bits in all of them: it decides between tokens directly. mixed has 8 bits also where rounding costs most, in attention
and on the feed-forward's way down: SmolLM2's perplexity is 42.7 then, 53.5 with int4 and 39.8 in float32, at no loss of
speed. int8-dynamic is ONNX' own form (one scale for each output, MatMulInteger).

Embeddings that are tied to the output layer are read out of its 8-bit blocks, so the matrix is stored once.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from models.workshop import graph

_EIGHT = {"int4": "", "mixed": "attn|down_proj", "int8": ".*"}
"""Which matrices have 8 bits beside the output layer, the others having 4."""

BLOCK = 32  # weights; MLAS has its fastest kernels for 32, and it is what GGUF's formats take
_INT8 = 4  # `accuracy_level` of MatMulNBits: activations are rounded to 8 bits


def main(source: Path, target: Path, kind: str) -> None:
    logging.disable(logging.WARNING)
    if kind not in _EIGHT:
        _dynamic(source, target)
        return
    model = graph.load(source)
    head = graph.head_of(model.graph)
    weight = graph.weight_of(model.graph, head)
    tied = _tied_embedding(model.graph, weight)
    names = {node.name for node in model.graph.node if node.op_type == "MatMul"}
    eight = {head.name} | {name for name in names if _EIGHT[kind] and re.search(_EIGHT[kind], name)}
    model = _blocks(_blocks(model, 8, names - eight), 4, eight)
    if tied is not None:
        _share(model.graph, tied, graph.head_of(model.graph))
        _drop(model.graph, weight.name)
    graph.save(model, target)


def _dynamic(source: Path, target: Path) -> None:
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )


def _blocks(model: onnx.ModelProto, bits: int, exclude: set[str]) -> onnx.ModelProto:
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=BLOCK,
        is_symmetric=False,
        accuracy_level=_INT8,
        nodes_to_exclude=sorted(exclude),
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


def _tied_embedding(of: onnx.GraphProto, weight: onnx.TensorProto) -> onnx.NodeProto | None:
    """The node that looks tokens up in the output layer's matrix, or in a copy of it."""
    lookup = next((node for node in of.node if node.op_type == "Gather" and node.input[1] == "input_ids"), None)
    if lookup is None:
        return None
    turned = any(
        node.op_type == "Transpose" and node.input[0] == weight.name and node.output[0] == lookup.input[0]
        for node in of.node
    )
    table = next((tensor for tensor in of.initializer if tensor.name == lookup.input[0]), None)
    if turned or (table is not None and _is_transposed(table, weight)):
        return lookup
    return None


def _is_transposed(table: onnx.TensorProto, weight: onnx.TensorProto) -> bool:
    if list(table.dims) != list(weight.dims)[::-1]:
        return False
    return bool(np.array_equal(numpy_helper.to_array(table), numpy_helper.to_array(weight).T))


def _share(of: onnx.GraphProto, lookup: onnx.NodeProto, head: onnx.NodeProto) -> None:
    """Reads embeddings out of the head's blocks: (V, d / 32, 32) bytes are (V, d), with scales of (V, d / 32)."""
    blocks = next(tensor for tensor in of.initializer if tensor.name == head.input[1])
    vocab, per_row, block = blocks.dims
    shape = numpy_helper.from_array(np.array([vocab, per_row * block], np.int64), "skerry/embedding/shape")
    of.initializer.append(shape)
    table = helper.make_node("Reshape", [blocks.name, shape.name], ["skerry/embedding/table"], "skerry/embedding/table")
    read = helper.make_node(
        "GatherBlockQuantized",
        [table.output[0], lookup.input[1], *head.input[2:4]],
        [lookup.output[0]],
        "skerry/embedding",
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=block,
        bits=8,
    )
    nodes = [node for node in of.node if node.output[0] not in (lookup.input[0], lookup.output[0])]
    del of.node[:]
    of.node.extend([table, read, *nodes])
    _drop(of, lookup.input[0])


def _drop(of: onnx.GraphProto, name: str) -> None:
    """A tensor that nothing reads any more."""
    for tensor in of.initializer:
        if tensor.name == name and not any(name in node.input for node in of.node):
            of.initializer.remove(tensor)
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
