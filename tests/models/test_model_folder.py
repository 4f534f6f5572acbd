"""What is refused before onnxruntime gets any of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.model_folder import check_folder, check_tokenizer
from protocol.errors import BadModelFile, UnsafePath
from tests.models.onnx_folders import VOCAB, external, inputs, model, outputs, tokenizer, value, write_folder

FLOAT, FLOAT16, INT64, INT4 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT4


def test_a_decoder_is_described(tmp_path: Path) -> None:
    outside = external("w", [5, 3], INT4, location="model.onnx.data", offset=2, length=8)
    made = model(tensors=[outside])
    decoder = check_folder(write_folder(tmp_path, made, **{"model.onnx.data": bytes(10)}))
    assert (decoder.layers, decoder.kv_heads, decoder.head_size) == (2, 3, 4)
    assert (decoder.vocab, decoder.width, decoder.kv_dtype) == (VOCAB, 8, "float32")
    assert (decoder.position_ids, decoder.hidden, decoder.last_only, decoder.shared) == (False, True, True, True)


def test_another_layout_is_described(tmp_path: Path) -> None:
    half = {name: value(name, FLOAT16, ["b", 3, "p", 4]) for name in (*inputs(), *outputs()) if "." in name}
    ins = inputs(
        **{name: one for name, one in half.items() if name.startswith("past")},
        position_ids=value("position_ids", INT64, ["b", "t"]),
    )
    outs = outputs(
        **{name: value(name, FLOAT16, ["b", "h", "p", "s"]) for name in half if name.startswith("present")},
        hidden_states=None,
        logits=value("logits", FLOAT, ["b", "t", VOCAB]),
    )
    decoder = check_folder(write_folder(tmp_path, model(ins, outs)))
    assert (decoder.kv_dtype, decoder.position_ids, decoder.hidden) == ("float16", True, False)
    assert (decoder.width, decoder.last_only) == (None, False)


LEAVING = [
    "/etc/passwd",
    "../secret",
    "a/../../secret",
    "inside/weights",
    "..\\secret",
    "C:secret",
    "*/_ORT_MEM_ADDR_/*",  # onnxruntime's own mark for an address in memory
    ".hidden",  # not in the model's fingerprint
    "manifest.json",
    "a\x1b[2J",
]


@pytest.mark.parametrize("location", LEAVING)
def test_weights_lie_beside_the_model(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(100))
    folder = write_folder(tmp_path / "m", model(tensors=[external("w", [4], location=location)]))
    (folder / "inside").mkdir()
    for name in (".hidden", "manifest.json", "inside/weights"):
        (folder / name).write_bytes(bytes(100))
    with pytest.raises(UnsafePath, match="not a plain file beside it"):
        check_folder(folder)


def test_the_tensors_of_branches_and_constants_are_checked_too(tmp_path: Path) -> None:
    hidden = external("w", [4], location="../secret")
    body = helper.make_graph([], "body", [], [], [hidden])
    for node in (
        helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body),
        helper.make_node("Constant", [], ["z"], value=hidden),
    ):
        with pytest.raises(UnsafePath):
            check_folder(write_folder(tmp_path / "m", model(more=[node])))


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    folder = write_folder(tmp_path / "m", model(tensors=[external("w", [4], location="w.data")]), real=bytes(16))
    (folder / "w.data").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePath, match="a link to outside"):
        check_folder(folder)
    (folder / "w.data").unlink()
    (folder / "w.data").symlink_to("real")
    assert check_folder(folder)


def test_weights_that_are_missing_truncated_or_no_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", model(tensors=[external("w", [4], location="w.data", offset=4)]))
    data = folder / "w.data"
    with pytest.raises(BadModelFile, match=r"w\.data: missing"):
        check_folder(folder)
    data.symlink_to("w.data")
    with pytest.raises(BadModelFile, match=r"w\.data: missing"):
        check_folder(folder)
    data.unlink()
    data.write_bytes(bytes(19))
    with pytest.raises(BadModelFile, match=r"w\.data: truncated: 'w'"):
        check_folder(folder)
    data.write_bytes(bytes(20))
    assert check_folder(folder)
    data.unlink()
    os.mkfifo(data)  # who opened it would wait for ever
    with pytest.raises(BadModelFile, match="not a file"):
        check_folder(folder)


def typed(count: int, **data: Any) -> Any:
    return TensorProto(name="w", data_type=FLOAT, dims=[count], **data)


@pytest.mark.parametrize(
    "tensor",
    [
        external("w", [1 << 40], location="w.data", length=16),
        external("w", [4], INT4, location="w.data", length=16),
        typed(1 << 40),
        typed(4, raw_data=bytes(15)),
        typed(5, float_data=[1.0] * 4),
        TensorProto(name="w", data_type=INT64, dims=[1 << 30], int64_data=[1, 2]),
    ],
    ids=["outside", "4 bits", "nothing", "raw", "floats", "integers"],
)
def test_tensors_are_as_long_as_their_shapes_say(tmp_path: Path, tensor: Any) -> None:
    folder = write_folder(tmp_path, model(tensors=[tensor]), **{"w.data": bytes(16)})
    with pytest.raises(BadModelFile, match="damaged: 'w' is not as long as its shape says"):
        check_folder(folder)


def test_tensors_of_every_kind_pass(tmp_path: Path) -> None:
    kinds = [np.float32, np.float16, np.int64, np.uint8, np.bool_, np.float64]
    tensors = [numpy_helper.from_array(np.ones((2, 3), kind), f"raw {kind.__name__}") for kind in kinds]
    others = (FLOAT, INT64, FLOAT16, TensorProto.BFLOAT16, TensorProto.UINT8, TensorProto.DOUBLE, INT4)
    tensors += [helper.make_tensor(f"typed {kind}", kind, [5], [1, 2, 3, 4, 5]) for kind in others]
    tensors += [helper.make_tensor("empty", FLOAT, [0, 3], []), helper.make_tensor("scalar", FLOAT, [], [1.0])]
    tensors.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"abc"]))
    assert check_folder(write_folder(tmp_path, model(tensors=tensors)))


REFUSED: dict[str, tuple[Any, str]] = {
    "no cache": (model({"input_ids": inputs()["input_ids"]}), "no decoder with a cache"),
    "no ids": (model(inputs(input_ids=None)), "no input input_ids"),
    "half a layer": (model(inputs(**{"past_key_values.1.value": None})), "no input past_key_values.1.value"),
    "no logits": (model(outs=outputs(logits=None)), "no output logits"),
    "no present": (model(outs=outputs(**{"present.1.key": None})), "no output present.1.key"),
    "an encoder's states": (
        model(inputs(encoder=value("encoder", FLOAT, ["b", "t", 8]))),
        "wants inputs that Skerry does not have: 'encoder'",
    ),
    "ids of float": (model(inputs(input_ids=value("input_ids", FLOAT, ["b", "t"]))), "input_ids does not take"),
    "one token": (model(inputs(input_ids=value("input_ids", INT64, ["b", 1]))), "input_ids does not take"),
    "int8 cache": (
        model(inputs(**{"past_key_values.0.key": value("past_key_values.0.key", 3, ["b", 3, "p", 4])})),
        "cache is of int8",
    ),
    "fixed cache": (
        model(inputs(**{"past_key_values.0.key": value("past_key_values.0.key", FLOAT, ["b", 3, 512, 4])})),
        "not of shape",
    ),
    "absurd heads": (
        model(inputs(**{"past_key_values.0.key": value("past_key_values.0.key", FLOAT, ["b", 1 << 30, "p", 4])})),
        "which no model has",
    ),
    "layers that differ": (
        model(inputs(**{"past_key_values.1.key": value("past_key_values.1.key", FLOAT, ["b", 3, "p", 5])})),
        "past_key_values.1.key is of another type or shape",
    ),
    "present of another size": (
        model(outs=outputs(**{"present.1.key": value("present.1.key", FLOAT, ["b", 3, "p", 5])})),
        "present.1.key is of another type or shape",
    ),
    "float16 logits": (model(outs=outputs(logits=value("logits", FLOAT16, ["b", 1, VOCAB]))), "logits is of float16"),
    "absurd vocabulary": (model(outs=outputs(logits=value("logits", FLOAT, ["b", 1, 1 << 40]))), "logits is not"),
    "logits without shape": (model(outs=outputs(logits=value("logits", FLOAT, None))), "logits is not of shape"),
    "seven logits": (model(outs=outputs(logits=value("logits", FLOAT, ["b", 7, VOCAB]))), "logits for 7 tokens"),
    "one state": (
        model(outs=outputs(hidden_states=value("hidden_states", FLOAT, ["b", 1, 8]))),
        "hidden_states is not for all tokens",
    ),
    "custom operator": (
        model(more=[helper.make_node("Run", [], ["z"], domain="evil.corp")]),
        "loads no library for: 'evil.corp:Run'",
    ),
    "compiled engine": (
        model(more=[helper.make_node("EPContext", [], ["z"], domain="com.microsoft")]),
        "loads no library for",
    ),
}


@pytest.mark.parametrize(("made", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_decoder_is_refused_with_a_remedy(tmp_path: Path, made: Any, problem: str) -> None:
    with pytest.raises(BadModelFile) as refused:
        check_folder(write_folder(tmp_path, made))
    assert problem in str(refused.value)
    assert "`skerry models export` makes" in str(refused.value)


def test_functions_and_sparse_tensors_are_refused(tmp_path: Path) -> None:
    function = helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [])
    with_function, with_sparse = model(), model()
    with_function.functions.append(function)
    with_sparse.graph.sparse_initializer.add()
    for made in (with_function, with_sparse):
        with pytest.raises(BadModelFile, match="sparse tensors or functions"):
            check_folder(write_folder(tmp_path, made))


@pytest.mark.parametrize("ids", [VOCAB // 2, VOCAB - 2, VOCAB])
def test_a_tokenizer_that_fits(tmp_path: Path, ids: int) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer(ids)))
    check_tokenizer(tmp_path, VOCAB)


def test_a_unigram_tokenizer_counts_by_place(tmp_path: Path) -> None:
    written = tokenizer(model={"type": "Unigram", "vocab": [["a", -1.5], ["b", 0]] * (VOCAB // 2)}, added_tokens=[])
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    check_tokenizer(tmp_path, VOCAB)
    with pytest.raises(BadModelFile, match="another model's tokenizer"):
        check_tokenizer(tmp_path, VOCAB - 1)


@pytest.mark.parametrize("ids", [VOCAB + 1, VOCAB // 2 - 1])
def test_another_models_tokenizer_is_refused(tmp_path: Path, ids: int) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer(ids)))
    with pytest.raises(BadModelFile, match=f"has {ids} tokens and the model logits for {VOCAB}: it is another model's"):
        check_tokenizer(tmp_path, VOCAB)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"model": {"vocab": 3}}',
        b'{"model": {"vocab": {"a": "b"}}}',
        b'{"model": {"vocab": {"a": -1}}}',
        b'{"model": {"vocab": {}}}',
        b'{"deep": ' + b"[" * 100_000,
        b'{"model": {"vocab": {"\xff": 1}}}',
        b'{"x": "' + b":" * 3_000_000 + b'"}',
    ],
    ids=["empty", "list", "number", "text", "negative", "none", "deep", "no text", "long"],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(BadModelFile, match=r"tokenizer\.json: (not as|has no tokens|no file, or larger)"):
        check_tokenizer(tmp_path, VOCAB)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="copy the tokenizer"):
        check_tokenizer(tmp_path, VOCAB)
