"""`skerry models inspect`: what a model is, and what it lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict

import click

from models.store import Places, resolve_model
from models.workshop.inspect import Report, inspect
from tools.commands.models.stored import as_json

_CONTROLS = 8  # that are shown


@click.command(name="inspect")
@click.argument("model", metavar="ID|PATH")
@click.option("--tensors", is_flag=True, help="List every tensor too.")
@as_json
def inspect_model(model: str, tensors: bool, as_json: bool) -> None:
    """Look into a GGUF file or a folder with an ONNX model, without loading it: what it is and what it lacks.

    \b
    Example:
      skerry models inspect smollm2-135m
      skerry models inspect ~/my-model-onnx --tensors
    """
    report = inspect(resolve_model(model, Places.of(os.environ)))
    if as_json:
        found = asdict(report)
        if not tensors:
            del found["tensors"]
        click.echo(json.dumps(found, indent=2))
        return
    lines = [*_facts(report), *_shares(report), *(_tensors(report) if tensors else ()), *_missing(report)]
    click.echo("\n".join(map(_printable, lines)))


def _facts(report: Report) -> Iterator[str]:
    yield report.path
    rows = {
        "format": {"gguf": "GGUF", "onnx": "ONNX"}[report.format],
        "architecture": report.architecture,
        "quantisation": report.quantisation,
        "parameters": f"{report.parameters / 1e6:,.1f} million",
        "size": f"{report.size / 1e6:,.1f} MB",
        "layers, width": f"{report.layers or 'unknown'}, {report.width or 'unknown'}",
        "context": f"{report.context:,} tokens" if report.context else "unknown",
        "tokenizer": f"{report.tokenizer}, {report.tokens:,} tokens, {len(report.controls)} of them control",
        "control": " ".join(report.controls[:_CONTROLS]) + (" …" if len(report.controls) > _CONTROLS else ""),
        "chat template": report.template,
        "licence": report.licence,
        "cache": report.cache,
        "hidden states": "yes" if report.hidden_states else "no",
    }
    for name, value in rows.items():
        yield f"  {name:15}{value}"
    for key, value in (report.manifest or {}).items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield f"  {'made: ' + key:15} {text[:300]}"


def _shares(report: Report) -> Iterator[str]:
    yield f"  {'TYPE':12}{'TENSORS':>9}{'VALUES':>16}{'BYTES':>16}"
    for share in report.shares:
        yield f"  {share.type:12}{share.tensors:>9,}{share.values:>16,}{share.bytes:>16,}"


def _tensors(report: Report) -> Iterator[str]:
    for tensor in report.tensors:
        shape = " x ".join(map(str, tensor.shape)) or "1"
        yield f"  {tensor.type:12}{shape:>20}{tensor.bytes:>16,}  {tensor.name}"


def _missing(report: Report) -> Iterator[str]:
    if not report.missing:
        yield "Nothing is missing."
        return
    yield "Missing:" if report.runs else "Skerry cannot run it:"
    for sentence in report.missing:
        yield f"  - {sentence}"


def _printable(line: str) -> str:
    """What a file says must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line)
