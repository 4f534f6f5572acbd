"""`skerry models export`: a model for onnxruntime out of a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path

import click

from models.catalog import MODEL
from models.engine.open import kind_of
from models.store import Places, resolve_model
from models.workshop.export import Exporter, export
from protocol.errors import BadModelFile
from tools.commands.models.made import show, working
from tools.commands.models.stored import as_json


@click.command(name="export")
@click.argument("source", metavar="ID|PATH")
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--exporter",
    type=click.Choice(["genai", "optimum"]),
    default="genai",
    show_default=True,
    help="genai writes the faster graphs, optimum knows more architectures.",
)
@as_json
def export_model(source: str, target: Path, exporter: Exporter, as_json: bool) -> None:
    """Make an ONNX model, in float32, of a GGUF file or a Hugging Face folder with *.safetensors.

    The result is a new folder. It is there only if it computes what PyTorch computes. Needs the extra [export].

    \b
    Example:
      skerry models export smollm2-135m ~/smollm2-onnx
      skerry models export ~/Qwen2.5-0.5B-Instruct ~/qwen-onnx --exporter optimum
    """
    found, target = _source(source), target.expanduser().absolute()
    with working() as job:
        made = export(found, target, exporter, job)
    show(target, made, as_json)


def _source(name: str) -> Path:
    """Raises UnknownModel, BadModelFile."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / MODEL).is_file():
        if not (folder / "config.json").is_file():
            raise BadModelFile(f"{folder}: not a Hugging Face folder: it has no config.json")
        return folder.absolute()
    found = resolve_model(name, Places.of(os.environ))
    if kind_of(found) == "onnx":
        raise BadModelFile(f"{found}: a model in ONNX already; `skerry models quantize` makes it smaller")
    return found
