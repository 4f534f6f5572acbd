"""Adapter files: what is written is read again, and nothing but an adapter is let through."""

from __future__ import annotations

import hashlib
import math
import resource
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import (
    MOST_RANK,
    Adapter,
    Factors,
    Floats,
    check_fits,
    parse,
    permute_rows,
    read,
    shapes_of,
    unpermute_rows,
    write,
)
from protocol.errors import BadAdapter, BadModelFile, StoreError
from tests.models.tiny import SHAPES, Tiny

MODEL = "ab" * 32


def factors(rank: int, d_out: int, d_in: int, seed: int = 0, size: float = 0.1) -> Factors:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, size, (rank, d_in)), rng.normal(0, size, (d_out, rank))
    return Factors(*(half.astype(np.float16).astype(np.float32) for half in (a, b)))


def adapter(**changes: object) -> Adapter:
    named = {"blk.0.attn_q": factors(4, 16, 8), "blk.11.ffn_down": factors(2, 8, 24, seed=1)}
    return replace(Adapter(MODEL, "llama", 8.0, named, np.array([0.6, -0.8], np.float32)), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("adapter") / "a.gguf"
    write(adapter(), path)
    return path.read_bytes()


# A GGUF file by hand: what a hostile device could send.
STRING, F32, F64, U32, ARRAY = (struct.pack("<I", kind) for kind in (8, 6, 12, 4, 9))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


KEYS = {
    "general.architecture": STRING + text("llama"),
    "general.type": STRING + text("adapter"),
    "adapter.type": STRING + text("lora"),
    "adapter.lora.alpha": F32 + struct.pack("<f", 8.0),
    "skerry.adapter.model": STRING + text(MODEL),
    "skerry.adapter.centroid": ARRAY + F32 + struct.pack("<Q2f", 2, 0.6, -0.8),
}


def entry(name: str, shape: tuple[int, ...], kind: int = 1, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def halves(named: dict[str, Floats]) -> tuple[list[bytes], bytes]:
    """Entries and data of tensors in float16."""
    entries, data = [], b""
    for name, values in named.items():
        entries.append(entry(name, values.shape, 1, len(data)))
        data += values.astype("<f2").tobytes()
        data += bytes(-len(data) % 32)
    return entries, data


def matrices(of: Adapter) -> dict[str, Floats]:
    return {f"{name}.weight.lora_{half}": getattr(f, half) for name, f in of.factors.items() for half in "ab"}


def gguf_file(keys: dict[str, bytes], entries: list[bytes] | None = None, data: bytes | None = None) -> bytes:
    usual = halves(matrices(adapter()))
    entries, data = usual[0] if entries is None else entries, usual[1] if data is None else data
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(keys))
    head += b"".join(text(key) + value for key, value in keys.items()) + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


def assert_same(one: Adapter, other: Adapter) -> None:
    assert (one.model, one.architecture, one.alpha) == (other.model, other.architecture, other.alpha)
    assert one.factors.keys() == other.factors.keys()
    for name, pair in one.factors.items():
        np.testing.assert_array_equal(pair.a, other.factors[name].a)
        np.testing.assert_array_equal(pair.b, other.factors[name].b)
        assert pair.a.dtype == pair.b.dtype == np.float32
    if one.centroid is None or other.centroid is None:
        assert one.centroid is other.centroid
    else:
        np.testing.assert_array_equal(one.centroid, other.centroid)


class TestRoundTrip:
    @settings(max_examples=30, deadline=None)
    @given(
        ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
        shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        alpha=st.floats(0.125, 64.0, width=32),
        width=st.none() | st.integers(1, 30),
    )
    def test_what_is_written_is_read(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        ranks: list[int],
        shape: tuple[int, int],
        alpha: float,
        width: int | None,
    ) -> None:
        named = {f"blk.{at}.attn_v": factors(rank, *shape, seed=at) for at, rank in enumerate(ranks)}
        centroid = None if width is None else np.linspace(0.25, 1.0, width, dtype=np.float32)
        written = Adapter(MODEL, "qwen2", alpha, named, centroid)
        path = tmp_path_factory.getbasetemp() / "round-trip.gguf"
        id = write(written, path)
        assert_same(read(path), written)
        assert read(path).rank == max(ranks)
        assert id == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_the_same_adapter_is_the_same_file(self, raw: bytes, tmp_path: Path) -> None:
        again = adapter()
        turned = replace(again, factors=dict(reversed(again.factors.items())))
        assert write(turned, tmp_path / "deep" / "b.gguf") == hashlib.sha256(raw).hexdigest()
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["b.gguf"]

    def test_everything_counts_for_the_id(self, tmp_path: Path) -> None:
        half = adapter().factors["blk.0.attn_q"]
        others = (
            adapter(),
            adapter(model="cd" * 32),
            adapter(architecture="qwen2"),
            adapter(alpha=9.0),
            adapter(centroid=None),
            adapter(centroid=np.array([0.8, 0.6], np.float32)),
            adapter(factors={"blk.0.attn_q": half}),
            adapter(factors={"blk.0.attn_v": half}),
        )
        assert len({write(other, tmp_path / "a.gguf") for other in others}) == len(others)

    def test_a_later_versions_keys_are_tolerated(self) -> None:
        assert_same(parse(gguf_file(KEYS | {"skerry.adapter.rounds": U32 + b"\3\0\0\0"})), adapter())

    def test_values_between_those_of_float16_are_rounded(self, tmp_path: Path) -> None:
        pair = Factors(np.full((1, 4), 0.1, np.float32), np.full((4, 1), 0.3, np.float32))
        write(adapter(factors={"blk.0.attn_q": pair}), tmp_path / "a.gguf")
        np.testing.assert_allclose(read(tmp_path / "a.gguf").factors["blk.0.attn_q"].b, 0.3, rtol=1e-3)


class TestRefused:
    def test_the_file_by_hand_is_none_of_them(self, raw: bytes) -> None:
        assert_same(parse(gguf_file(KEYS)), adapter())
        assert_same(parse(raw), adapter())

    @pytest.mark.parametrize("key", [key for key in KEYS if key != "skerry.adapter.centroid"])
    def test_a_key_that_is_missing(self, key: str) -> None:
        with pytest.raises(BadAdapter):
            parse(gguf_file({k: v for k, v in KEYS.items() if k != key}))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("general.type", STRING + text("model")),
            ("general.type", U32 + b"\1\0\0\0"),
            ("general.architecture", STRING + text("llama\0")),
            ("adapter.type", STRING + text("control_vector")),
            ("adapter.lora.alpha", F64 + struct.pack("<d", 8.0)),  # llama.cpp would end the process
            ("adapter.lora.alpha", F32 + struct.pack("<f", 0.0)),
            ("adapter.lora.alpha", F32 + struct.pack("<f", -8.0)),
            ("adapter.lora.alpha", F32 + struct.pack("<f", math.nan)),
            ("adapter.lora.alpha", F32 + struct.pack("<f", math.inf)),
            ("adapter.lora.alpha", F32 + struct.pack("<f", 1e9)),
            ("skerry.adapter.model", STRING + text("ab")),
            ("skerry.adapter.model", STRING + text(MODEL.upper())),
            ("skerry.adapter.centroid", ARRAY + F32 + struct.pack("<Q", 0)),
            ("skerry.adapter.centroid", ARRAY + F32 + struct.pack("<Q2f", 2, 0.0, 0.0)),
            ("skerry.adapter.centroid", ARRAY + F32 + struct.pack("<Q2f", 2, 1.0, math.nan)),
            ("skerry.adapter.centroid", ARRAY + F64 + struct.pack("<Q2d", 2, 0.6, 0.8)),
            ("skerry.adapter.centroid", ARRAY + F32 + struct.pack("<Q", 1 << 60)),
            ("skerry.adapter.centroid", ARRAY + STRING + struct.pack("<Q", 1 << 60)),
            ("skerry.adapter.centroid", ARRAY + ARRAY * 50_000 + struct.pack("<Q", 1)),
            ("skerry.adapter.later", STRING + struct.pack("<Q", 1 << 62)),
            ("general.alignment", U32 + struct.pack("<I", 1 << 31)),
            ("general.alignment", U32 + struct.pack("<I", 0)),
            ("adapter.alora.invocation_tokens", ARRAY + U32 + struct.pack("<Q2I", 2, 1, 1 << 31)),
            ("split.count", U32 + b"\2\0\0\0"),
        ],
    )
    def test_a_key_of_another_value_or_type(self, key: str, value: bytes) -> None:
        with pytest.raises(BadAdapter):
            parse(gguf_file(KEYS | {key: value}))

    @pytest.mark.parametrize(
        "named",
        [
            {},
            {"blk.0.attn_q.weight.lora_a": (2, 8)},
            {"blk.0.attn_q.weight.lora_a": (2, 8), "blk.0.attn_k.weight.lora_b": (8, 2)},
            {"blk.0.attn_q.weight.lora_a": (2, 8), "blk.0.attn_q.weight.lora_b": (8, 3)},
            {"blk.0.attn_q.weight.lora_a": (MOST_RANK + 1, 8), "blk.0.attn_q.weight.lora_b": (8, MOST_RANK + 1)},
            {"blk.0.attn_q.weight.lora_a": (0, 8), "blk.0.attn_q.weight.lora_b": (8, 0)},
            {"blk.0.attn_q.weight.lora_a": (2, 0), "blk.0.attn_q.weight.lora_b": (8, 2)},
            {"blk.0.attn_q.weight.lora_a": (8,), "blk.0.attn_q.weight.lora_b": (8, 1)},
            {"blk.0.attn_q.weight.lora_a": (1, 2, 8), "blk.0.attn_q.weight.lora_b": (8, 2)},
            {"token_embd.weight.lora_a": (2, 8), "token_embd.weight.lora_b": (8, 2)},
            {"blk.0.attn_norm.weight": (1, 8), "blk.0.attn_q.weight.lora_b": (8, 1)},
            {"blk.0.attn_q\0.weight.lora_a": (2, 8), "blk.0.attn_q\0.weight.lora_b": (8, 2)},
            {"blk.0.a" + "b" * 60 + ".weight.lora_a": (2, 8), "blk.0.a" + "b" * 60 + ".weight.lora_b": (8, 2)},
        ],
    )
    def test_matrices_that_are_no_changes(self, named: dict[str, tuple[int, ...]]) -> None:
        with pytest.raises(BadAdapter):
            parse(gguf_file(KEYS, *halves({name: np.ones(shape, np.float32) for name, shape in named.items()})))

    def test_the_largest_rank_is_none_of_them(self) -> None:
        pair = factors(MOST_RANK, 8, 8)
        named = {"blk.0.attn_q.weight.lora_a": pair.a, "blk.0.attn_q.weight.lora_b": pair.b}
        assert parse(gguf_file(KEYS, *halves(named))).rank == MOST_RANK

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 6e4])
    def test_values_that_no_training_makes(self, value: float) -> None:
        named = matrices(adapter())
        named["blk.0.attn_q.weight.lora_b"][3, 1] = value
        with pytest.raises(BadAdapter, match=r"blk\.0\.attn_q"):
            parse(gguf_file(KEYS, *halves(named)))

    @pytest.mark.parametrize(
        "entries",
        [
            [
                entry("blk.0.attn_q.weight.lora_a", (2, 8)),
                entry("blk.0.attn_q.weight.lora_b", (8, 2)),
            ],  # one over the other
            [entry("blk.0.attn_q.weight.lora_a", (2, 8)), entry("blk.0.attn_q.weight.lora_a", (2, 8), 1, 32)],
            [entry("blk.0.attn_q.weight.lora_a", (2, 8)), entry("blk.0.attn_q.weight.lora_b", (8, 2), 1, 1 << 63)],
            [entry("blk.0.attn_q.weight.lora_a", (2, 8)), entry("blk.0.attn_q.weight.lora_b", (8, 2), 0, 32)],
            [entry("blk.0.attn_q.weight.lora_a", (2, 8)), entry("blk.0.attn_q.weight.lora_b", (8, 2), 1 << 31, 32)],
            [
                entry("blk.0.attn_q.weight.lora_a", (1, 1 << 63)),
                entry("blk.0.attn_q.weight.lora_b", (1 << 63, 1), 1, 0),
            ],
            [
                entry("blk.0.attn_q.weight.lora_a", (1 << 32, 1 << 32)),
                entry("blk.0.attn_q.weight.lora_b", (8, 2), 1, 0),
            ],
        ],
    )
    def test_tensors_that_do_not_lie_in_the_file(self, entries: list[bytes]) -> None:
        with pytest.raises(BadAdapter):
            parse(gguf_file(KEYS, entries, bytes(64)))

    @pytest.mark.parametrize("counts", [(1 << 62, 6), (4, 1 << 62), (1 << 62, 1 << 62)])
    def test_counts_that_no_file_has(self, raw: bytes, counts: tuple[int, int]) -> None:
        with pytest.raises(BadAdapter):
            parse(raw[:8] + struct.pack("<QQ", *counts) + raw[24:])

    def test_what_a_header_claims_takes_no_memory(self) -> None:
        numbers = ARRAY + struct.pack("<IQ", 0, 60_000_000) + bytes(60_000_000)
        hostile = gguf_file(KEYS | {"skerry.adapter.later": numbers})
        tracemalloc.start()
        try:
            with pytest.raises(BadAdapter):
                parse(hostile)
            assert tracemalloc.get_traced_memory()[1] < 1 << 23
        finally:
            tracemalloc.stop()

    def test_one_key_twice(self) -> None:
        twice = KEYS | {"adapter.lora.alphb": F32 + struct.pack("<f", 800.0)}
        with pytest.raises(BadAdapter):
            parse(gguf_file(twice).replace(b"adapter.lora.alphb", b"adapter.lora.alpha"))

    def test_every_truncation_and_what_is_appended(self, raw: bytes) -> None:
        for length in range(len(raw)):
            with pytest.raises(BadAdapter):
                parse(raw[:length])
        with pytest.raises(BadAdapter):
            parse(raw + bytes(32))

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_flipped_bits_are_an_adapter_or_a_bad_one(self, raw: bytes, data: st.DataObject) -> None:
        damaged = bytearray(raw)
        for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
            damaged[at] ^= data.draw(st.integers(1, 255))
        try:
            found = parse(bytes(damaged))
        except BadAdapter:
            return
        for pair in found.factors.values():
            assert np.isfinite(pair.a).all()
            assert np.isfinite(pair.b).all()
            assert pair.a.shape[0] == pair.b.shape[1]

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=300), st.booleans())
    def test_anything_else(self, raw: bytes, with_magic: bool) -> None:
        with pytest.raises(BadAdapter):
            parse(b"GGUF\3\0\0\0" * with_magic + raw)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.gguf", tmp_path):
            with pytest.raises(BadAdapter, match="cannot be read"):
                read(path)

    def test_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(BadAdapter):
            read(Tiny("llama").write(tmp_path / "model.gguf"))


class TestWriting:
    @pytest.mark.parametrize(
        "bad",
        [
            adapter(alpha=math.nan),
            adapter(model="unknown"),
            adapter(centroid=np.array([], np.float32)),
            adapter(factors={}),
            adapter(factors={"output": factors(2, 8, 8)}),
            adapter(factors={"blk.0.attn_q": Factors(np.ones((2, 8), np.float32), np.ones((8, 3), np.float32))}),
            adapter(factors={"blk.0.attn_q": Factors(np.ones((0, 8), np.float32), np.ones((8, 0), np.float32))}),
            adapter(factors={"blk.0.attn_q": factors(2, 8, 8, size=np.nan)}),
            adapter(factors={"blk.0.attn_q": Factors(np.full((1, 8), 1e5, "f4"), np.full((8, 1), 1e-5, "f4"))}),
        ],
    )
    def test_what_could_not_be_read_is_not_written(self, raw: bytes, tmp_path: Path, bad: Adapter) -> None:
        path = tmp_path / "a.gguf"
        path.write_bytes(raw)
        with pytest.raises(BadAdapter):
            write(bad, path)
        assert path.read_bytes() == raw
        assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]

    def test_a_folder_that_takes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StoreError, match="cannot be written"):
            write(adapter(), tmp_path / "file" / "a.gguf")

    def test_a_disk_that_takes_no_more_leaves_the_old_file(self, raw: bytes, tmp_path: Path) -> None:
        path = tmp_path / "a.gguf"
        path.write_bytes(raw)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(raw) // 2, limits[1]))
        try:
            with pytest.raises(StoreError, match="cannot be written"):
                write(adapter(alpha=9.0), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == raw
        assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


class TestShapes:
    def test_a_models_matrices(self, tmp_path: Path) -> None:
        shapes = shapes_of(Tiny("llama").write(tmp_path / "model.gguf"))
        assert {name.removeprefix("blk.1."): shape for name, shape in shapes.items() if "blk.1" in name} == SHAPES
        assert "blk.0.attn_norm" not in shapes

    def test_what_is_no_model_file(self, tmp_path: Path) -> None:
        (tmp_path / "text.gguf").write_text("<html>404 not found</html>")
        for name in ("text.gguf", "none.gguf"):
            with pytest.raises(BadModelFile, match=name):
                shapes_of(tmp_path / name)

    def test_an_adapter_of_another_shape_does_not_fit(self) -> None:
        shapes = {"blk.0.attn_q": (16, 8), "blk.11.ffn_down": (8, 24), "blk.1.attn_q": (16, 8)}
        check_fits(adapter(), shapes)
        for wrong in ({"blk.0.attn_q": (16, 8)}, shapes | {"blk.0.attn_q": (8, 16)}, {}):
            with pytest.raises(BadAdapter, match=r"blk\.(0\.attn_q|11\.ffn_down)"):
                check_fits(adapter(), wrong)


class TestRowOrder:
    def test_halves_of_a_head_become_neighbours(self) -> None:
        rows = np.arange(12, dtype=np.float32)[:, None] * np.ones(3, np.float32)
        assert permute_rows(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]

    @given(heads=st.integers(1, 5), half=st.integers(1, 6), rank=st.integers(1, 4))
    def test_there_and_back(self, heads: int, half: int, rank: int) -> None:
        b = np.random.default_rng(0).normal(size=(heads * half * 2, rank)).astype(np.float32)
        np.testing.assert_array_equal(unpermute_rows(permute_rows(b, heads), heads), b)
        np.testing.assert_array_equal(permute_rows(unpermute_rows(b, heads), heads), b)
