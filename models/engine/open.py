"""Which engine runs a model: llama.cpp a GGUF file, onnxruntime a folder with an ONNX model.

An engine's library is loaded only when a model of its kind is opened: a device needs the one that it uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from protocol.errors import BadModelFile

Kind = Literal["gguf", "onnx"]


def kind_of(path: Path) -> Kind:
    """By what is there; nothing is believed of its content yet. Raises BadModelFile if it is neither."""
    if path.is_dir():
        if (path / "model.onnx").is_file():
            return "onnx"
        raise BadModelFile(f"{path}: a folder without a model.onnx; `skerry models export` makes one")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}; `skerry models pull` fetches a model") from None
    if magic == b"GGUF":
        return "gguf"
    hint = "; name the folder that it is in" if path.suffix == ".onnx" else ""
    raise BadModelFile(f"{path}: not a GGUF file, nor a folder with an ONNX model{hint}")
