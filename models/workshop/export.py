"""A GGUF file or a Hugging Face folder becomes an ONNX model that Skerry runs, checked against PyTorch.

    GGUF -> Hugging Face folder -> ONNX -> the GGUF file's tokenizer -> logits as PyTorch's? -> manifest -> rename

Two exporters, both well kept elsewhere: onnxruntime-genai's builder writes graphs with GroupQueryAttention, whose cache
is not copied, for the architectures that it knows; Optimum exports what transformers knows. What goes wrong on the way
leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.catalog import MODEL
from models.engine.open import kind_of, open_tokenizer
from models.gguf_header import read_contents, read_header
from models.hf_config import read_json
from models.workshop import manifest
from models.workshop.child import here, run
from models.workshop.job import Job, making, publish
from models.workshop.manifest import Manifest
from protocol.errors import BadModelFile, WorkshopError

Exporter = Literal["genai", "optimum"]

AGREES = 1e-3
"""Largest difference to PyTorch's logits, as a part of the largest of them."""

_BUILDER = "onnxruntime_genai.models.builder"
_BUILT = ["include_hidden_states=true", "prune_lm_head=true", "hf_remote=false", "hf_token=false"]
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_PACKAGES = ("onnxruntime-genai", "optimum-onnx", "onnx", "torch", "transformers", "tokenizers")
_CHECKED = "The lighthouse keeper counted 12 boats, wrote “naïve café” into the log and said: for i in range(10): pass"
_TOKENS = 32  # that are compared


def export(source: Path, target: Path, exporter: Exporter, job: Job) -> Manifest:
    """Writes the folder `target`, in float32. Raises BadModelFile, WorkshopError, DiskFull, ConfigError."""
    from_gguf = not source.is_dir()
    size = _float_bytes(source) if from_gguf else _check_hf(source)
    with making(target, (3 if from_gguf else 2) * size, job) as work:
        folder = source
        if from_gguf:
            folder = work / "hf"
            run("reading the GGUF file", "models.workshop.hf_from_gguf", [here(source), here(folder)],
                env=job.env, say=job.say)  # fmt: skip
        out = work / "out"
        _build(folder, out, exporter, job)
        if from_gguf:
            _take_tokenizer(source, out)
        checks = _compare(folder, out, work, job)
        made = manifest.of_folder(
            out,
            source,
            action="export",
            quantisation="fp32",
            licence=read_header(source).licence if from_gguf else licence_of(source),
            parameters={"exporter": exporter},
            packages=_PACKAGES,
            checks=checks,
        )
        publish(out, target, made)
    return made


def licence_of(folder: Path) -> str:
    """As the front matter of the folder's README.md has it (the hub's model card)."""
    card = folder / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as lines:
            for _, line in zip(range(200), lines, strict=False):
                if line.startswith("license:"):
                    return line.partition(":")[2].strip() or "unknown"
    return "unknown"


def _float_bytes(source: Path) -> int:
    """Of a GGUF file's weights in float32. Raises BadModelFile."""
    if kind_of(source) != "gguf":
        raise BadModelFile(f"{source}: an export begins with a GGUF file or a Hugging Face folder")
    with source.open("rb") as file:
        return 4 * sum(int(np.prod(tensor.shape)) for tensor in read_contents(file).tensors)


def _check_hf(folder: Path) -> int:
    """Bytes of its weights in float32. Raises BadModelFile unless transformers can load it without running its code."""
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise BadModelFile(f"{folder}: the model brings code of its own, which is not run")
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise BadModelFile(f"{folder}: no *.safetensors in it; pickled weights (*.bin) are never read: convert them")
    read_json(folder / "tokenizer.json")
    wide = {"float32": 1}.get(str(config.get("torch_dtype") or config.get("dtype")), 2)
    return wide * sum(path.stat().st_size for path in weights)


def _build(folder: Path, out: Path, exporter: Exporter, job: Job) -> None:
    if exporter == "optimum":
        run("exporting with Optimum", "models.workshop.optimum_export", [here(folder), here(out)],
            env=job.env, say=job.say)  # fmt: skip
    else:
        arguments = ["-i", here(folder), "-o", here(out), "-p", "fp32", "-e", "cpu", "--extra_options", *_BUILT]
        try:
            run("exporting with onnxruntime-genai", _BUILDER, arguments, env=job.env, say=job.say)
        except WorkshopError as error:
            hint = "`--exporter optimum` may know an architecture that this one does not"
            raise WorkshopError(f"{error}\n{hint}") from None
    for file in out.iterdir():  # exporters leave some of these out, write others anew, and add what nobody reads
        if not file.name.startswith((MODEL, "genai_config")):
            file.unlink()
    for name in _BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _take_tokenizer(source: Path, out: Path) -> None:
    """What begins and ends a text, and the chat template, as llama.cpp reads them from the GGUF file; and a check that
    both tokenizers are one. Raises WorkshopError."""
    from models.engine.gguf import GgufTokenizer

    original = GgufTokenizer.open(source)
    begins = original.encode("a", start=True)[:1] == original.encode(original.begin, special=True)[:1]
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": original.begin or None,
            "eos_token": original.end or None,
            "add_bos_token": bool(original.begin) and begins,
            "chat_template": original.template,
        },
    )
    (out / "chat_template.jinja").unlink(missing_ok=True)
    _write_json(out / "generation_config.json", {"eos_token_id": sorted(original.eog)})
    copy = open_tokenizer(out)
    if copy.fingerprint != original.fingerprint:
        raise WorkshopError(f"{source}: its vocabulary changed on the way to tokenizer.json: this export is no good")
    for text in (_CHECKED, "  1234567890\n\n\tdon't I'LL ", "日本語 Привет 😀 \x00"):
        if copy.encode(text) != original.encode(text):
            raise WorkshopError(f"{source}: tokenizer.json splits {text!r} in another way than llama.cpp does")


def _compare(folder: Path, out: Path, work: Path, job: Job) -> dict[str, float]:
    """Runs the same tokens through PyTorch and the engine. Raises WorkshopError if they differ."""
    from models.engine.onnx import OnnxEngine

    tokens = open_tokenizer(out).encode(_CHECKED)[:_TOKENS]
    saved = work / "reference.npz"
    run("computing the same with PyTorch", "models.workshop.reference",
        [here(folder), here(saved), *map(str, tokens)], env=job.env, say=job.say)  # fmt: skip
    engine = OnnxEngine(out, context=2 * _TOKENS, sequences=1)
    place = engine.open(tokens, 0)
    logits, hidden = [], []
    for token in tokens:
        (step,) = engine.forward([(place, [token])])
        assert step.hidden is not None
        logits.append(step.logits.copy())
        hidden.append(step.hidden.copy())
    place.close()
    engine.close()
    with np.load(saved) as expected:
        checks = {
            "logits_relative_error": _difference(np.array(logits), expected["logits"]),
            "hidden_relative_error": _difference(np.array(hidden), expected["hidden"]),
        }
    job.say(f"against PyTorch: {', '.join(f'{name} {value:.1e}' for name, value in checks.items())}")
    for name, value in checks.items():
        if not value <= AGREES:
            raise WorkshopError(f"the export computes something else than PyTorch: {name} {value:.2g}")
    return checks


def _difference(ours: Any, expected: Any) -> float:
    width = min(ours.shape[1], expected.shape[1])  # one side may have its vocabulary filled up
    return float(np.abs(ours[:, :width] - expected[:, :width]).max() / np.abs(expected).max())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
