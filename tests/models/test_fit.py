"""Which model fits a device (models/fit.py), how large models are, and what the boards can do."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import onnx
import pytest
from gguf import GGUFWriter
from onnx import TensorProto, helper

from models import boards, parameters
from models.boards import BOARDS, Speed
from models.catalog import Catalog
from models.fit import Budget, Candidate, Choice, fit, nearest, needed, toml
from models.footprint import Shape, footprint, guessed_shape, largest_context, read_shape
from models.gguf_header import Tensor
from models.latency import DecodePoint, DecodeTable
from models.onnx_header import Blockwise, OnnxGraph, OnnxTensor
from protocol.errors import BadModelFile

GB, MB = 10**9, 10**6
SLOW = Speed(bytes_s=GB)  # a file of 100 MB: ten tokens per second


@dataclass(frozen=True)
class Config:
    context: int = 4096
    kv: str = "q8_0"
    repack: bool = False


def candidate(name: str, megabytes: int, weights: int, rate: float = 0.0, **given: object) -> Candidate:
    """With a table if there is a rate."""
    shape = replace(Shape(megabytes * MB, 8192, 0, weights), **given)  # type: ignore[arg-type]
    points = (DecodePoint(64, rate, 100.0),) if rate else ()
    return Candidate(name, shape, "Q4_K_M", DecodeTable(name, "gguf", "cpu", 2, points, 0.0) if rate else None)


def judged(*candidates: Candidate, memory: int = 10 * GB, tok_s: float = 5.0, repack: bool = False) -> list[Choice]:
    return fit(candidates, Budget(memory, tok_s, 4096), SLOW, repack)


def names(choices: Sequence[Choice]) -> list[str]:
    return [choice.candidate.name for choice in choices]


# What to take


def test_the_largest_that_is_fast_enough_is_taken() -> None:
    choices = judged(candidate("small", 50, 10), candidate("huge", 400, 1000), candidate("large", 100, 100))
    assert names(choices) == ["huge", "large", "small"]
    assert [choice.fits for choice in choices] == [False, True, True]
    assert choices[0].problems == ("too slow: 2.5 of 5 tok/s",)
    assert choices[1].tok_s == pytest.approx(10.0)


def test_of_equally_many_weights_more_bits_are_better() -> None:
    assert names(judged(candidate("q4", 50, 100), candidate("q8", 100, 100))) == ["q8", "q4"]


def test_what_does_not_fit_says_by_how_much_and_what_would_help() -> None:
    large = replace(candidate("large", 100, 100), shape=Shape(100 * MB, 8192, 10_000, 100))
    (choice,) = judged(large, memory=260 * MB)
    missing = choice.memory - 260 * MB
    assert choice.problems == (f"too large by {-(-missing // MB)} MB",)
    (change,) = choice.changes
    more, _, less = change.partition(" or ")
    assert judged(large, memory=int(more.removeprefix("--memory ")) * MB)[0].fits
    assert fit([large], Budget(260 * MB, 5.0, int(less.removeprefix("--context "))), SLOW, False)[0].fits


def test_a_context_for_which_it_was_not_trained_is_a_problem() -> None:
    (choice,) = judged(candidate("short", 10, 10, context=2048))
    assert choice.problems == ("trained for 2048 tokens of context, not 4096",)
    assert choice.changes == ("--context 2048",)
    assert choice.settings.context == 2048


def test_if_none_fits_the_nearest_is_named_with_what_would_have_to_change() -> None:
    choices = judged(candidate("slow", 250, 100), candidate("slower", 500, 1000))
    near = nearest(choices)
    assert near.candidate.name == "slow"
    assert near.changes == ("--tok-s 4",)
    assert judged(near.candidate, tok_s=4.0)[0].fits


def test_what_was_measured_counts_and_not_the_estimate() -> None:
    (choice,) = judged(candidate("fast", 400, 100, rate=50.0))
    assert choice.measured
    assert choice.tok_s == pytest.approx(50.0)
    assert choice.settings.threads == 2, "it was measured with these"


def test_others_are_estimated_by_the_measured_one_nearest_in_size() -> None:
    choices = judged(
        candidate("measured small", 50, 10, rate=10.0),  # reaches 0.5 GB/s
        candidate("measured large", 500, 1000, rate=8.0),  # reaches 4 GB/s
        candidate("other", 400, 100),
    )
    other = next(choice for choice in choices if choice.candidate.name == "other")
    assert not other.measured
    assert other.tok_s == pytest.approx(10.0)


def test_the_same_engine_tells_more_than_the_same_size() -> None:
    choices = judged(
        candidate("onnx", 400, 100, rate=1.0, element=4.0),
        candidate("gguf", 100, 10, rate=30.0),
        candidate("other", 400, 50),
    )
    assert next(choice for choice in choices if choice.candidate.name == "other").tok_s == pytest.approx(7.5)


def test_cells_and_arithmetic_bound_an_estimate_too() -> None:
    wide = Candidate("wide", Shape(100 * MB, 8192, 100_000, 100))
    cells = 4096 * 100_000 * 34 / 32
    assert judged(wide)[0].tok_s == pytest.approx(GB / (100 * MB + cells))
    heavy = Candidate("heavy", Shape(100 * MB, 8192, 0, GB))
    assert fit([heavy], Budget(GB, 1.0, 4096), Speed(GB, weights_s=2 * GB), False)[0].tok_s == pytest.approx(2.0)


def test_weights_are_rearranged_where_that_helps_and_there_is_room() -> None:
    usual = candidate("usual", 100, 100)
    assert judged(usual, repack=True)[0].settings.repack
    assert judged(usual, repack=True)[0].memory - judged(usual)[0].memory == 100 * MB
    assert not judged(usual, repack=False)[0].settings.repack
    tight = judged(usual, repack=True, memory=300 * MB)[0]
    assert (tight.fits, tight.settings.repack) == (True, False)
    assert not judged(replace(usual, quantisation="Q4_1"), repack=True)[0].settings.repack


def test_the_lines_of_the_configuration_can_be_read() -> None:
    (gguf,) = judged(candidate('a "quoted" näme', 100, 100))
    section = {"name": 'a "quoted" näme', "context": 4096, "threads": 0, "kv": "q8_0", "repack": False}
    assert tomllib.loads(toml(gguf))["model"] == section
    (folder,) = judged(candidate("folder", 100, 100, element=4.0))
    assert set(tomllib.loads(toml(folder))["model"]) == {"name", "context", "threads"}


def test_memory_is_that_of_the_context_that_is_used() -> None:
    short = candidate("short", 10, 10, context=2048, cell=1000)
    assert needed(short, Budget(GB, 1.0, 4096)) == footprint(short.shape, Config(context=2048))


def test_every_known_board_runs_a_model_of_the_catalog() -> None:
    candidates = [
        Candidate(listed.entry.id, guessed_shape(listed.entry), listed.entry.quantisation) for listed in Catalog()
    ]
    taken = {}
    for name, board in BOARDS.items():
        choices = fit(candidates, Budget(board.free_mb * MB, 5.0, 4096), board.speed, board.repack)
        taken[name] = next(choice.candidate.name for choice in choices if choice.fits)
    assert taken["pi4"] == "qwen2.5-coder-0.5b"
    assert {taken[name] for name in BOARDS if name != "pi4"} == {"qwen2.5-coder-1.5b"}


# Sizes


def test_an_onnx_folder_s_cells_are_as_wide_as_its_graph_says_and_are_not_repacked() -> None:
    shape = Shape(100 * MB, 8192, 1000, 100, element=4.0)
    assert footprint(shape, Config(kv="q8_0", repack=True)) == 125 * MB + (4096 + 256) * 4000 + 150 * MB
    assert largest_context(shape, Config(), 275 * MB + (4096 + 256) * 4000) == 4096


def test_a_tokenizer_that_is_not_llama_cpp_s_takes_memory_for_each_token() -> None:
    small, large = (Shape(100 * MB, 8192, 1000, 100, element=4.0, vocab=vocab) for vocab in (50_000, 250_000))
    assert footprint(large, Config()) - footprint(small, Config()) == 200_000 * 1200


def test_entries_tell_their_weights_by_name_or_by_size() -> None:
    known = {listed.entry.id: guessed_shape(listed.entry).weights for listed in Catalog()}
    assert known["smollm2-135m"] == 135_000_000
    assert known["qwen2.5-coder-0.5b"] == 500_000_000
    entry = Catalog().find("smollm2-135m").entry
    nameless = type(entry)(**{**{key: getattr(entry, key) for key in entry.__struct_fields__}, "id": "x", "name": "x"})
    assert guessed_shape(nameless).weights == pytest.approx(135e6, rel=0.3)


def test_weights_are_counted_the_same_in_any_format() -> None:
    gguf = [
        Tensor("token_embd.weight", (100, 64), 0, 0),
        Tensor("output.weight", (100, 64), 0, 0),
        Tensor("blk.0.ffn_up.weight", (128, 64), 0, 0),
        Tensor("blk.0.ffn_norm.weight", (64,), 0, 0),
    ]
    assert parameters.of_gguf(gguf) == 100 * 64 + 128 * 64
    assert parameters.of_gguf([]) == 0
    plain = OnnxGraph(
        initializers=[
            OnnxTensor("embed", 1, (100, 64), None, 0, 0),
            OnnxTensor("lm_head", 1, (64, 100), None, 0, 0),
            OnnxTensor("up", 1, (64, 128), None, 0, 0),
            OnnxTensor("norm", 1, (64,), None, 0, 0),
            OnnxTensor("cos_cache", 1, (512, 32), None, 0, 0),
        ]
    )
    packed = OnnxGraph(
        initializers=[
            OnnxTensor("embed", 1, (100, 64), None, 0, 0),
            OnnxTensor("up_Q4", 2, (128, 2, 16), None, 0, 0),
            OnnxTensor("up_scales", 1, (128, 2), None, 0, 0),
            OnnxTensor("head_Q8", 2, (100, 2, 32), None, 0, 0),
            OnnxTensor("head_scales", 1, (100, 2), None, 0, 0),
        ],
        blockwise=[
            Blockwise("MatMulNBits", 4, 32, 128 * 64, ("up_Q4", "up_scales")),
            Blockwise("MatMulNBits", 8, 32, 100 * 64, ("head_Q8", "head_scales")),
        ],
    )
    assert parameters.of_onnx(plain, 100) == parameters.of_onnx(packed, 100) == parameters.of_gguf(gguf)


def decoder(folder: Path, shared: bool) -> Path:
    """A graph with the inputs and outputs of a decoder of one layer: 2 heads of 4, 10 tokens."""

    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    caches = [(f"past_key_values.0.{kind}", f"present.0.{kind}") for kind in ("key", "value")]
    past = [value(name, TensorProto.FLOAT, "batch", 2, "past", 4) for name, _ in caches]
    present = [value(name, TensorProto.FLOAT, "batch", 2, "total", 4) for _, name in caches]
    ids = [value(name, TensorProto.INT64, "batch", "tokens") for name in ("input_ids", "attention_mask")]
    weights = helper.make_tensor("weights", TensorProto.FLOAT, (10, 8), bytes(320), raw=True)
    attention = helper.make_node(
        "GroupQueryAttention" if shared else "Concat", [], [], domain="com.microsoft" if shared else ""
    )
    logits = value("logits", TensorProto.FLOAT, "batch", "tokens", 10)
    graph = helper.make_graph([attention], "decoder", [*ids, *past], [logits, *present], [weights])
    folder.mkdir()
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    return folder


def test_the_shape_of_an_onnx_folder(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "shared", shared=True)
    shape = read_shape(folder)
    bytes_of_files = sum(file.stat().st_size for file in folder.iterdir())
    assert shape == Shape(bytes_of_files, 512, 2 * 2 * 4, 80, element=4.0, vocab=10)
    assert read_shape(decoder(tmp_path / "grown", shared=False)).element == 8.0, "it is read from one block to another"


@pytest.mark.parametrize(("heads", "context"), [(0, 512), (4, 0), (100, 512), (4, "long")])
def test_an_absurd_header_has_no_shape(heads: int, context: int | str, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "absurd.gguf", "llama")
    numbers = {
        "block_count": 2,
        "embedding_length": 64,
        "attention.head_count": heads,
        "attention.head_count_kv": heads,
    }
    for key, number in numbers.items():
        writer.add_int32(f"llama.{key}", number)
    if isinstance(context, int):
        writer.add_int32("llama.context_length", context)
    else:
        writer.add_string("llama.context_length", context)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadModelFile, match=r"absurd\.gguf"):
        read_shape(tmp_path / "absurd.gguf")


def test_what_is_no_model_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(BadModelFile, match=r"damaged\.gguf"):
        read_shape(tmp_path / "damaged.gguf")
    with pytest.raises(BadModelFile):
        read_shape(tmp_path)


# Boards


def test_a_machine_s_memory_speed_is_its_best_sweep() -> None:
    seconds = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    assert boards.memory_speed(lambda: next(seconds), threads=2) == Speed(boards._SWEPT / 1.0)
    ticks = count()
    assert boards.memory_speed(lambda: float(next(ticks)), threads=1).weights_s == float("inf")


def test_this_processor_has_a_name() -> None:
    assert boards.processor()
