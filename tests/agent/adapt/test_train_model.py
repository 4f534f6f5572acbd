"""The model in torch is the model that serves (agent/adapt/torch_model.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agent.adapt.recipe import Recipe
from agent.adapt.torch_model import (
    Attention,
    Base,
    RmsNorm,
    SwiGlu,
    distributions,
    faster_in_bfloat16,
    grouped,
    states,
    states_all,
)
from agent.adapt.train import train
from models.adapter import Adapter, Factors, Floats, write
from models.engine.gguf import GgufEngine
from protocol.errors import BadAdapter, BadModelFile, TrainingError
from tests.agent.adapt.taught import lessons
from tests.models.tiny import LAYERS, SHAPES, VOCAB, Tiny

CONTEXTS = [[5, 77, 3, 9, 23, 54, 8], [11, 12], [40, 17, 90, 2, 2, 31, 60, 88, 13, 1, 1, 7], [95]]
ALL = range(VOCAB)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(request.param)


@pytest.fixture(scope="module")
def file(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def base(file: Path) -> Base:
    return Base.load(file, 1, bfloat16=False)


def logits(base: Base, adapter: Adapter | None = None) -> Floats:
    return states(base, adapter, CONTEXTS) @ base.head(ALL).T


def softmax(rows: Floats) -> Floats:
    likely = np.exp(rows - rows.max(-1, keepdims=True))
    return np.asarray(likely / likely.sum(-1, keepdims=True))


def drawn(base: Base, scale: float = 0.1) -> Adapter:
    """An adapter that changes every matrix."""
    random = np.random.default_rng(5)
    factors = {
        f"blk.{layer}.{name}": Factors(
            random.normal(0, scale, (3, d_in)).astype(np.float32),
            random.normal(0, scale, (d_out, 3)).astype(np.float32),
        )
        for layer in range(LAYERS)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(base.fingerprint, base.architecture, 6.0, factors)


def test_its_logits_are_the_model_s(tiny: Tiny, base: Base) -> None:
    """In one batch of all lengths."""
    assert np.allclose(logits(base), np.stack([tiny.logits(tokens) for tokens in CONTEXTS]), atol=2e-3)


def test_in_bfloat16_they_are_near(tiny: Tiny, file: Path) -> None:
    near = softmax(logits(Base.load(file, 1, bfloat16=True)))
    assert np.abs(near - softmax(np.stack([tiny.logits(tokens) for tokens in CONTEXTS]))).sum(1).max() < 0.1


def test_states_are_llama_cpp_s_embeddings(base: Base, file: Path) -> None:
    engine = GgufEngine(file, context=256, sequences=1, threads=1, hidden=True, kv="f16")
    for tokens, state in zip(CONTEXTS, states(base, None, CONTEXTS), strict=True):
        place = engine.open(tokens, 1)
        step = engine.forward([(place, tokens)])[0]
        place.close()
        assert step.hidden is not None
        assert np.allclose(state, step.hidden, atol=2e-2)
    engine.close()


def test_an_adapter_is_served_as_it_was_trained(base: Base, file: Path, tmp_path: Path) -> None:
    """Whatever matrices it changes, and whichever order their rows have: through the file, in llama.cpp."""
    adapter = drawn(base)
    engine = GgufEngine(file, context=256, sequences=1, threads=1, hidden=False, kv="f16")
    write(adapter, tmp_path / "adapter.gguf")
    mix = ((engine.attach(tmp_path / "adapter.gguf"), 1.0),)
    place = engine.open(CONTEXTS[0], 1, mix)
    served = softmax(engine.forward([(place, CONTEXTS[0])])[0].logits)
    engine.close()
    trained, bare = distributions(base, adapter, CONTEXTS[:1], ALL)[0], distributions(base, None, CONTEXTS[:1], ALL)[0]
    assert np.abs(served - trained).sum() < 0.01
    assert np.abs(bare - trained).sum() > 0.2


def test_the_real_model_serves_what_was_trained(smollm2: Path, tmp_path: Path) -> None:
    """To what llama.cpp rounds: it multiplies with eight-bit activations."""
    engine = GgufEngine(smollm2, context=256, sequences=1, threads=1, hidden=False, kv="f16")
    taught = lessons(engine.tokenizer, 2)
    base = Base.load(smollm2, 1, bfloat16=False)
    recipe = Recipe(modules=("attn_q", "attn_v"), layers=0, batch=2, epochs=3, rate=3e-3)
    adapter = train(base, taught, recipe)
    write(adapter, tmp_path / "adapter.gguf")
    mix = ((engine.attach(tmp_path / "adapter.gguf"), 1.0),)
    prompt = taught[0].tokens[: taught[0].targets[0].position]
    place = engine.open(prompt, 1, mix)
    served = softmax(engine.forward([(place, prompt)])[0].logits)
    engine.close()
    trained, bare = (distributions(base, one, [prompt], range(base.vocab))[0] for one in (adapter, None))
    assert 0.5 * np.abs(served - trained).sum() < 0.05
    assert 0.5 * np.abs(bare - trained).sum() > 0.1


def test_afterwards_the_model_is_bare(base: Base) -> None:
    before = logits(base)
    assert not np.allclose(logits(base, drawn(base)), before, atol=1e-2)
    assert np.array_equal(logits(base), before)


def test_states_of_a_text_are_those_at_the_end_of_each_beginning(base: Base) -> None:
    text = CONTEXTS[2]
    ends = states(base, None, [text[: n + 1] for n in range(len(text))])
    assert np.allclose(states_all(base, None, text), ends, atol=1e-3)


def test_distributions_are_cut_to_the_ids(tiny: Tiny, base: Base) -> None:
    ids = [9, 4, 60]
    expected = softmax(np.stack([tiny.logits(tokens)[ids] for tokens in CONTEXTS]))
    assert np.allclose(distributions(base, None, CONTEXTS, ids), expected, atol=1e-3)


def test_an_adapter_that_does_not_fit_is_refused(base: Base) -> None:
    other = Adapter("b" * 64, base.architecture, 6.0, drawn(base).factors)
    with pytest.raises(BadAdapter, match="another model"):
        states(base, other, CONTEXTS)
    narrow = {"blk.0.attn_q": Factors(np.ones((2, 5), np.float32), np.ones((5, 2), np.float32))}
    with pytest.raises(BadAdapter, match=r"blk\.0\.attn_q"):
        states(base, Adapter(base.fingerprint, base.architecture, 6.0, narrow), CONTEXTS)
    assert np.array_equal(logits(base), logits(base))


def test_other_architectures_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="gemma3"):
        Base.load(Tiny("gemma3").write(tmp_path / "other.gguf"), 1, bfloat16=False)


def test_a_truncated_file_is_no_model(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match="truncated"):
        Base.load(cut, 1, bfloat16=False)
    cut.write_bytes(b"GGUF")
    with pytest.raises(BadModelFile, match="header"):
        Base.load(cut, 1, bfloat16=False)
    with pytest.raises(BadModelFile, match="cannot be read"):
        Base.load(tmp_path / "none.gguf", 1, bfloat16=False)


def test_the_faster_type_is_measured() -> None:
    assert faster_in_bfloat16() in (True, False)


@pytest.mark.parametrize("length", [5, 300])
def test_attention_has_torch_s_gradient(length: int) -> None:
    """Of one block of queries and of several."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, length, 8), (2, 3, length, 8), (2, 3, length, 8)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    above = torch.randn(shapes[0], generator=generator)
    ours = torch.autograd.grad(Attention.apply(*inputs), inputs, above)
    theirs = torch.autograd.grad(
        F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True), inputs, above
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_norm_and_gate_have_the_gradient_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(3, 7, generator=generator, requires_grad=True) for _ in range(3))
    weight = torch.rand(7, generator=generator)
    rms = (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight).square().sum()
    assert torch.allclose(
        *(torch.autograd.grad(value, x)[0] for value in (rms, RmsNorm.apply(x, weight, 1e-5).square().sum())), atol=1e-5
    )
    for part in (gate, up):
        plain, ours = (f.square().sum() for f in (F.silu(gate) * up, SwiGlu.apply(gate, up)))
        assert torch.allclose(torch.autograd.grad(plain, part)[0], torch.autograd.grad(ours, part)[0], atol=1e-5)


def test_groups_are_of_like_length_and_bounded() -> None:
    lengths = [3, 50, 4, 49, 200, 5]
    groups = grouped(lengths, 100)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert [1, 3] in groups
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100 for group in groups)
