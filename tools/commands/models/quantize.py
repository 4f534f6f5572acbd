"""`skerry models quantize`: the same model with fewer bits."""

from __future__ import annotations

import os
from pathlib import Path

import click

from models.store import Places, resolve_model
from models.workshop.quantize import KINDS, quantize
from tools.commands.models.made import show, working
from tools.commands.models.stored import as_json


@click.command(name="quantize")
@click.argument("source", metavar="ID|PATH")
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "kind",
    required=True,
    type=click.Choice([kind for kinds in KINDS.values() for kind in kinds]),
    help=f"For ONNX: {', '.join(KINDS['onnx'])}; for GGUF: {', '.join(KINDS['gguf'])}.",
)
@as_json
def quantize_model(source: str, target: Path, kind: str, as_json: bool) -> None:
    """Make a smaller model of a GGUF file or of a folder with an ONNX model: another of its kind, beside it.

    TARGET is a new file or folder. `skerry models compare` says what it costs. Needs the extra [export] for ONNX.

    \b
    Example:
      skerry models quantize ~/smollm2-onnx ~/smollm2-int4 --to int4
      skerry models quantize ~/my-model-f16.gguf ~/my-model-q4.gguf --to q4_k_m
    """
    found, target = resolve_model(source, Places.of(os.environ)), target.expanduser().absolute()
    with working() as job:
        made = quantize(found, target, kind, job)
    show(target, made, as_json)
