"""Which engine runs a model: llama.cpp a GGUF file, onnxruntime a folder with an ONNX model.

An engine's library is loaded only when a model of its kind is opened: a device needs the one that it uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.engine.base import Engine, Tokenizer
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


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`context` cells are shared by up to `sequences` requests; `threads` 0: every physical core; `hidden`: steps also
    give the last hidden state. `kv` and `repack` are llama.cpp's, `providers` onnxruntime's."""

    name: str | None = None
    context: int = 4096
    sequences: int = 4
    threads: int = 0
    hidden: bool = True
    kv: str = "q8_0"
    repack: bool = False
    providers: tuple[str, ...] = ()


def open_engine(path: Path, options: EngineOptions) -> Engine:
    """Raises BadModelFile, UnsafePath, ConfigError."""
    common: dict[str, Any] = {
        "name": options.name,
        "context": options.context,
        "sequences": options.sequences,
        "threads": options.threads,
        "hidden": options.hidden,
    }
    if kind_of(path) == "gguf":
        with _installed("gguf"):
            from models.engine.gguf import GgufEngine
        return GgufEngine(path, **common, kv=options.kv, repack=options.repack)
    with _installed("onnx"):
        from models.engine.onnx import OnnxEngine
    return OnnxEngine(path, **common, providers=options.providers)


def open_tokenizer(path: Path) -> Tokenizer:
    """A model's tokenizer, without its weights. Raises BadModelFile, UnsafePath."""
    if kind_of(path) == "gguf":
        with _installed("gguf"):
            from models.engine.gguf import GgufTokenizer
        return GgufTokenizer.open(path)
    with _installed("onnx"):
        from models.engine.hf_tokenizer import HfTokenizer
    from models.model_folder import check_folder, check_tokenizer

    vocab = check_folder(path).vocab
    check_tokenizer(path, vocab)
    return HfTokenizer(path, vocab)


@contextmanager
def _installed(kind: Kind) -> Iterator[None]:
    """Turns a missing library into BadModelFile."""
    try:
        yield
    except ModuleNotFoundError as error:
        package, extra = str(error.name).partition(".")[0], "[onnx]" if kind == "onnx" else ""
        raise BadModelFile(
            f"a model in {kind.upper()} needs {package}, which is not installed: pip install 'skerry{extra}' "
            "(docs/install.md)"
        ) from None
