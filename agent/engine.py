"""The configured model, opened with the engine that it is for."""

from __future__ import annotations

from pathlib import Path

from agent.config import Model
from models.engine.base import Engine
from models.engine.open import EngineOptions, Kind, kind_of, open_engine
from protocol.errors import ConfigError

_OTHER: dict[Kind, str] = {
    "gguf": "a GGUF file: `skerry models export` makes an ONNX model of it",
    "onnx": "a folder with an ONNX model: name the GGUF file that it was made from (no tool makes one of it)",
}


def open_model(model: Model, path: Path, *, hidden: bool) -> Engine:
    """`hidden`: steps also give the last hidden state. Raises BadModelFile, UnsafePath, ConfigError."""
    check_kind(model, path)
    options = EngineOptions(
        name=model.name,
        context=model.context,
        sequences=model.sequences,
        threads=model.threads,
        hidden=hidden,
        kv=model.kv,
        repack=model.repack,
        providers=tuple(model.providers),
    )
    return open_engine(path, options)


def check_kind(model: Model, path: Path) -> Kind:
    """Raises ConfigError if the model is not for the engine that is configured, BadModelFile if it is no model."""
    kind = kind_of(path)
    if model.engine not in ("auto", kind):
        raise ConfigError(f'model.engine = "{model.engine}", but {path} is {_OTHER[kind]}; or set "auto"')
    return kind
