"""What an exported graph lacks is added to it: the last hidden state as an output, and logits for the last token alone.

Without the first a device has no memory (its keys are hidden states). Without the second a prompt of T tokens costs T
times the output layer, which in a small model with a large vocabulary is a third of all work, and T * V logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from protocol.errors import BadModelFile

HIDDEN = "hidden_states"
_LAST = "skerry/last_token"


def complete(model: onnx.ModelProto) -> None:
    """Adds both in place. Raises BadModelFile if the graph has no output layer that can be found."""
    graph = model.graph
    head = head_of(graph)
    outputs = {value.name: value for value in graph.output}
    hidden = head.input[0]
    if HIDDEN not in outputs:
        _rename(graph, hidden, HIDDEN)
        hidden = HIDDEN
        matrix, turn = _matrix(graph, head)
        shape = ["batch_size", "sequence_length", matrix.dims[0 if turn is None else 1]]
        graph.output.append(helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, shape))
    middle = outputs["logits"].type.tensor_type.shape.dim[1]
    if middle.dim_value != 1:
        graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), f"{_LAST}/index"))
        last = helper.make_node("Gather", [hidden, f"{_LAST}/index"], [_LAST], name=_LAST, axis=1)
        graph.node.insert(list(graph.node).index(head), last)
        head.input[0] = _LAST
        middle.Clear()
        middle.dim_value = 1
        _forget_shapes(graph)


def head_of(graph: onnx.GraphProto) -> onnx.NodeProto:
    """The matrix product that makes the logits: the first one on the way back from them. Raises BadModelFile."""
    made_by = {output: node for node in graph.node for output in node.output}
    name = "logits"
    while name in made_by:
        node = made_by[name]
        if node.op_type in ("MatMul", "MatMulNBits"):
            return node
        name = node.input[0]
    raise BadModelFile("the graph has no matrix product before its logits: this export is not understood")


def weight_of(graph: onnx.GraphProto, node: onnx.NodeProto) -> onnx.TensorProto:
    """The matrix of a product, (d_in, d_out). One that is another one turned, as tied embeddings are, is stored first.

    Raises BadModelFile if it is no constant.
    """
    tensor, turn = _matrix(graph, node)
    if turn is None:
        return tensor
    values = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
    graph.initializer.append(numpy_helper.from_array(values, turn.output[0]))
    graph.node.remove(turn)
    return graph.initializer[-1]


def _matrix(graph: onnx.GraphProto, node: onnx.NodeProto) -> tuple[onnx.TensorProto, onnx.NodeProto | None]:
    """What is stored of a product's matrix, and the node that turns it, if one does. Raises BadModelFile."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    name = node.input[1]
    if name in stored:
        return stored[name], None
    for turn in graph.node:
        if turn.op_type == "Transpose" and turn.output[0] == name and turn.input[0] in stored:
            return stored[turn.input[0]], turn
    raise BadModelFile(f"the matrix of {node.name} is computed, not stored: this export is not understood")


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _forget_shapes(graph: onnx.GraphProto) -> None:
    """Shapes that were noted for what lies between the hidden state and the logits are no longer true."""
    del graph.value_info[:]


def load(path: Path) -> onnx.ModelProto:
    """With its tensors. Raises BadModelFile."""
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf and onnx have many classes
        raise BadModelFile(f"{path}: cannot be read: {str(error)[:200]}") from None


def save(model: onnx.ModelProto, path: Path) -> None:
    """The graph in `path`, its tensors beside it: a graph alone is read in milliseconds, and has no limit of 2 GB."""
    beside = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=beside)
