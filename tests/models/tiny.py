"""A language model of random weights, small enough to be computed by hand: in numpy, and as a GGUF file.

Its matrices have their rows in Hugging Face's order and rotary embedding turns halves, as in transformers' Llama and
Qwen2; the file has llama.cpp's order. So whatever is said about the order of rows is put to the test. Float32
throughout: nothing but summation differs between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from models.adapter import permute_rows

Floats = NDArray[np.float32]

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, VOCAB = 2, 128, 4, 2, 192, 96
_HEAD = WIDTH // HEADS
_BASE, _EPSILON = 10_000.0, 1e-5
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (KV_HEADS * _HEAD, WIDTH),
    "attn_v": (KV_HEADS * _HEAD, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}
TURNED = {"attn_q": HEADS, "attn_k": KV_HEADS}
"""The matrices whose rows architecture llama has in another order, and their heads."""


class Tiny:
    """`weights` by name without ".weight"; they may be changed. Architecture llama or qwen2."""

    def __init__(self, architecture: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.architecture = architecture
        shapes = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
        shapes |= {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH)}
        self.weights: dict[str, Floats] = {
            name: rng.normal(0, 2 * shape[1] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()
        }
        self.biases: dict[str, Floats] = {}
        if architecture == "qwen2":
            self.biases = {
                f"blk.{layer}.{name}": rng.normal(0, 0.3, SHAPES[name][0]).astype(np.float32)
                for layer in range(LAYERS)
                for name in ("attn_q", "attn_k", "attn_v")
            }

    def write(self, path: Path, tokens: Sequence[str] = ()) -> Path:
        """With a tokenizer of these tokens, as GPT-2 writes bytes, or without one."""
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(512)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(_BASE)
        writer.add_rope_dimension_count(_HEAD)
        writer.add_layer_norm_rms_eps(_EPSILON)
        writer.add_vocab_size(VOCAB)
        writer.add_tokenizer_model("gpt2" if tokens else "no_vocab")
        if tokens:
            writer.add_token_list(tokens)
            writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
        for name, weight in self.weights.items():
            heads = TURNED.get(name.split(".")[-1]) if self.architecture == "llama" else None
            writer.add_tensor(f"{name}.weight", permute_rows(weight, heads) if heads else weight)
        for name, bias in self.biases.items():
            writer.add_tensor(f"{name}.bias", bias)
        for name in (
            "output_norm",
            *(f"blk.{layer}.{norm}_norm" for layer in range(LAYERS) for norm in ("attn", "ffn")),
        ):
            writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def logits(self, tokens: Sequence[int]) -> Floats:
        """(V,) after the last of the tokens."""
        x = self.weights["token_embd"][list(tokens)]  # (T, d)
        for layer in range(LAYERS):
            y = _norm(x)
            q = _rotate(_split(self._apply(layer, "attn_q", y), HEADS))
            k = _rotate(_split(self._apply(layer, "attn_k", y), KV_HEADS))
            v = _split(self._apply(layer, "attn_v", y), KV_HEADS)
            k, v = (np.repeat(one, HEADS // KV_HEADS, axis=0) for one in (k, v))
            scores = q @ k.swapaxes(1, 2) / np.sqrt(_HEAD)  # (heads, T, T)
            scores += np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
            attention = np.exp(scores - scores.max(axis=2, keepdims=True))
            attention /= attention.sum(axis=2, keepdims=True)
            x = x + self._apply(layer, "attn_output", (attention @ v).swapaxes(0, 1).reshape(len(tokens), -1))
            y = _norm(x)
            gate = self._apply(layer, "ffn_gate", y)
            x = x + self._apply(layer, "ffn_down", gate / (1 + np.exp(-gate)) * self._apply(layer, "ffn_up", y))
        logits: Floats = self.weights["output"] @ _norm(x[-1])
        return logits

    def _apply(self, layer: int, name: str, x: Floats) -> Floats:
        key = f"blk.{layer}.{name}"
        return x @ self.weights[key].T + self.biases.get(key, np.float32(0))


def _norm(x: Floats) -> Floats:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(_EPSILON))


def _split(x: Floats, heads: int) -> Floats:
    """(heads, T, d of a head)"""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def _rotate(x: Floats) -> Floats:
    half = x.shape[2] // 2
    angles = np.arange(x.shape[1])[:, None] * _BASE ** (-np.arange(half) / half)  # (T, half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
