"""What the JSON files beside an ONNX model say: how long its context is, what begins and ends a text, how to chat.

They come with the model from anywhere, so each is bounded in size and every field is checked for its type; what is
missing or of another type is as if it were not there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import BadModelFile

_LONGEST = 64 << 20  # bytes of one file; tokenizer.json of the largest vocabularies has some 30 MB


@dataclass(frozen=True, slots=True)
class FolderConfig:
    """`context` in tokens; `begin` and `end` as written, "" if there is none; `ends`: ids that end an answer;
    `add_begin`: whether texts begin with `begin`, None where nothing says so."""

    architecture: str
    context: int | None
    begin: str
    end: str
    ends: tuple[int, ...]
    add_begin: bool | None
    template: str | None


def read_config(folder: Path) -> FolderConfig:
    """Raises BadModelFile if a file is no JSON object."""
    model = _optional(folder / "config.json")
    generation = _optional(folder / "generation_config.json")
    genai = _dict(_optional(folder / "genai_config.json").get("model"))
    tokenizer = _optional(folder / "tokenizer_config.json")
    ends = [_ids(source.get("eos_token_id")) for source in (generation, genai, model)]
    add_begin = tokenizer.get("add_bos_token")
    return FolderConfig(
        architecture=str(model.get("model_type") or genai.get("type") or "unknown"),
        context=_positive(model.get("max_position_embeddings")) or _positive(genai.get("context_length")),
        begin=_token(tokenizer.get("bos_token")),
        end=_token(tokenizer.get("eos_token")),
        ends=next(filter(None, ends), ()),
        add_begin=add_begin if isinstance(add_begin, bool) else None,
        template=_template(folder, tokenizer.get("chat_template")),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises BadModelFile if it is missing, too long or no JSON object."""
    try:
        if path.exists() and not path.is_file():
            raise BadModelFile(f"{path}: not a file")
        if path.stat().st_size > _LONGEST:
            raise BadModelFile(f"{path}: larger than the {_LONGEST >> 20} MB that such a file may have")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BadModelFile(f"{path}: not JSON") from None
    if not isinstance(content, dict):
        raise BadModelFile(f"{path}: not a JSON object")
    return content


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _template(folder: Path, written: Any) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file() and path.stat().st_size <= _LONGEST:
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadModelFile(f"{path}: cannot be read: {error}") from None
    if isinstance(written, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in written if isinstance(one, dict)}
        written = named.get("default")
    return written if isinstance(written, str) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _token(value: Any) -> str:
    """A token stands there as text, or as an object with its text."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= 0)


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
