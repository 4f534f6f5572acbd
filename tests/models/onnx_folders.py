"""Folders that look like a decoder in ONNX: right from the outside, with next to nothing inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS, KV_HEADS, SIZE, WIDTH, VOCAB = 2, 3, 4, 8, 64
CELLS = ("batch", KV_HEADS, "past", SIZE)
NAMES = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def value(name: str, dtype: int, shape: Sequence[int | str] | None) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def inputs(**changed: Any) -> dict[str, Any]:
    """By name; a changed one that is None is left out."""
    found = {name: value(name, TensorProto.INT64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")}
    found |= {f"past_key_values.{n}": value(f"past_key_values.{n}", TensorProto.FLOAT, CELLS) for n in NAMES}
    return {name: one for name, one in (found | changed).items() if one is not None}


def outputs(**changed: Any) -> dict[str, Any]:
    found = {"logits": value("logits", TensorProto.FLOAT, ["batch", 1, VOCAB])}
    found["hidden_states"] = value("hidden_states", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    found |= {f"present.{n}": value(f"present.{n}", TensorProto.FLOAT, CELLS) for n in NAMES}
    return {name: one for name, one in (found | changed).items() if one is not None}


def external(name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT, **place: object) -> Any:
    """A tensor whose data is `place`: location, offset, length."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, told in place.items():
        tensor.external_data.add(key=key, value=str(told))
    return tensor


def nodes() -> list[Any]:
    """Of each kind that the reader looks into: blocks of few bits, a branch with a body, a constant."""
    scale = numpy_helper.from_array(np.ones(2, np.float32), "scale")
    body = helper.make_graph([helper.make_node("Neg", ["w"], ["y"])], "body", [], [value("y", 1, [2])], [scale])
    return [
        helper.make_node("GroupQueryAttention", ["input_ids"], ["a"], domain="com.microsoft", num_heads=3),
        helper.make_node(
            "MatMulNBits", ["x", "w_Q4", "w_scales"], ["b"], domain="com.microsoft", K=32, N=2, bits=4, block_size=32
        ),
        helper.make_node("If", ["c"], ["d"], then_branch=body, else_branch=body),
        helper.make_node("Constant", [], ["e"], value=numpy_helper.from_array(np.arange(3))),
    ]


def model(
    ins: dict[str, Any] | None = None,
    outs: dict[str, Any] | None = None,
    tensors: Sequence[Any] | None = None,
    more: Sequence[Any] = (),
) -> Any:
    if tensors is None:
        tensors = [numpy_helper.from_array(np.ones((2, 3), np.float32), "w")]
    graph = helper.make_graph(
        [*nodes(), *more], "tiny", [*(ins or inputs()).values()], [*(outs or outputs()).values()], tensors
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, producer_name="by-hand", ir_version=10, opset_imports=opsets)
    helper.set_model_props(made, {"origin": "test"})
    return made


def tokenizer(ids: int = VOCAB - 2, **changed: Any) -> dict[str, Any]:
    added = [{"id": ids - 1, "content": "<|end|>", "special": True}]
    vocab = {f"t{id}": id for id in range(ids - 1)}
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}} | changed


def write_folder(folder: Path, made: Any = None, **files: bytes) -> Path:
    """`files` beside the model, by name."""
    folder.mkdir(exist_ok=True)
    onnx.save(made or model(), folder / "model.onnx")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 512}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
