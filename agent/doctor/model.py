"""Whether the configured model is here, is what its name says, fits and writes; and which others would fit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.config import AgentConfig, Model, device_folder
from agent.doctor.finding import Finding, size
from agent.engine import open_model
from models import latency
from models.catalog import Catalog
from models.engine.open import kind_of
from models.fingerprint import fingerprint
from models.footprint import Shape, footprint, guessed_shape, largest_context
from models.store import Places, resolve_model, state
from protocol.errors import SkerryError

_STEPS = 8
_PROMPT = "The quick brown fox"


def check_catalog(catalog: Catalog, model: Model, available: int) -> Finding:
    """Which models of the catalog this machine has the memory for, under the configured context."""
    needs = {listed.entry.id: footprint(guessed_shape(listed.entry), model) for listed in catalog}
    fitting = [f"{id} ({size(need)})" for id, need in needs.items() if need <= available]
    larger = [f"{id} ({size(need)})" for id, need in needs.items() if need > available]
    if not fitting:
        text = f"none fits {size(available)} of available memory: {', '.join(larger)}"
        return Finding("warn", "catalog", text, "stop what else runs here, or lower model.context")
    return Finding(
        "ok", "catalog", f"fit: {', '.join(fitting)}" + (f"; too large: {', '.join(larger)}" if larger else "")
    )


def missing_bytes(catalog: Catalog, name: str, places: Places) -> int:
    """What a pull of the configured model still has to write; 0 for a path."""
    if name not in catalog:
        return 0
    entry = catalog.find(name).entry
    return entry.size if state(entry, places.models) in ("absent", "partial") else 0


def find_model(catalog: Catalog, name: str, places: Places) -> tuple[Path | None, Finding]:
    """The configured model's file, if it is here and right. Reads all of it where it has not been compared yet."""
    if name in catalog:
        found = state(catalog.find(name).entry, places.models)
        if found in ("absent", "partial"):
            how = "is only half pulled" if found == "partial" else "is not on this machine"
            return None, Finding("error", "model", f"{name} {how}", f"skerry models pull {name}")
    try:
        path = resolve_model(name, places)
    except SkerryError as error:
        known = name in catalog
        remedy = f"skerry models pull {name}" if known else "set model.name to a catalog id or the path of a model"
        return None, Finding("error", "model", str(error).removesuffix(f": run `{remedy}`"), remedy)
    checked = "SHA-256 as in the catalog" if name in catalog else "not in the catalog, so its content is not compared"
    return path, Finding("ok", "model", f"{name}: {path} ({checked})")


def check_memory(shape: Shape, model: Model, available: int) -> Finding:
    need = footprint(shape, model)
    text = f"{model.name} with a context of {min(model.context, shape.context)} takes {size(need)}"
    if need <= available:
        return Finding("ok", "memory", f"{text} of {size(available)} available")
    fits = largest_context(shape, model, available)
    remedy = f"lower model.context to {fits}" if fits >= 256 else "choose a smaller model"
    if model.repack:
        remedy = f"set model.repack = false, or {remedy}"
    return Finding("error", "memory", f"{text}, but only {size(available)} are available", remedy)


def check_settings(shape: Shape, config: AgentConfig, cores: int) -> Iterator[Finding]:
    """Values that are allowed each by itself, but make no sense with this model or on this machine."""
    model = config.model
    context = min(model.context, shape.context)
    if model.context > shape.context:
        yield Finding(
            "warn",
            "context",
            f"model.context = {model.context}, but the model was trained for {shape.context}, which is used",
            f"set model.context to {shape.context}",
        )
    if config.api.max_tokens >= context:
        yield Finding(
            "error",
            "context",
            f"api.max_tokens = {config.api.max_tokens} leaves no room for a prompt in a context of {context}",
            "lower api.max_tokens or raise model.context",
        )
    if model.threads > cores:
        yield Finding(
            "warn",
            "threads",
            f"model.threads = {model.threads} on {cores} physical cores: they wait for each other",
            "set model.threads to 0, which means one per physical core",
        )


def check_speed(path: Path, shape: Shape, config: AgentConfig, cores: int) -> Iterator[Finding]:
    """What was measured of the model by length of context (`skerry models fit`), and whether a step of the SLM is
    shorter than what it waits for a reply."""
    try:
        table = latency.load(device_folder(config), fingerprint(path), config.model.threads or cores)
    except OSError as error:
        yield Finding("error", "speed", f"{path}: cannot be read: {error.strerror}", "see to its permissions")
        return
    if table is None:
        text = "not measured here by length of context"
        yield Finding("ok", "speed", text, f"skerry models fit --model {config.model.name}")
        return
    context = min(config.model.context, shape.context)
    fast, slow = table.tok_s(1), table.tok_s(context)
    yield Finding("ok", "speed", f"measured {fast:.1f} tok/s, and {slow:.1f} after {context} tokens of context")
    step, deadline = 1000 * table.seconds(context), config.cloud.deadline_ms
    if config.cloud.url and deadline < step:
        text = f"cloud.deadline_ms = {deadline}, but with a full context one token of the SLM takes {step:.0f} ms"
        remedy = f"set cloud.deadline_ms above {step:.0f}: a reply that comes within a step costs no time"
        yield Finding("warn", "deadline", text, remedy)


def check_writing(path: Path, model: Model, *, hidden: bool) -> tuple[str | None, Finding]:
    """Loads the model with a tiny context and lets it write a few tokens; its tokenizer's fingerprint, if it can.
    `hidden`: it has to give hidden states."""
    began = time.perf_counter()
    try:
        engine = open_model(msgspec.structs.replace(model, context=256, sequences=1), path, hidden=hidden)
    except SkerryError as error:
        text, missing, install = str(error).partition(", which is not installed: ")
        remedy = install or "pull the model again, or choose another one"
        return None, Finding("error", "engine", text + missing.rstrip(": "), remedy)
    loaded = time.perf_counter()
    try:
        prompt = engine.tokenizer.encode(_PROMPT, start=True)
        place = engine.open(prompt, _STEPS)
        step = engine.forward([(place, prompt)])[0]
        started = time.perf_counter()
        for _ in range(_STEPS):
            step = engine.forward([(place, [int(step.logits.argmax())])])[0]
        rate = _STEPS / (time.perf_counter() - started)
        library = {"gguf": "llama.cpp", "onnx": f"onnxruntime on {engine.provider}"}[kind_of(path)]
        text = f"loads in {loaded - began:.1f} s and writes {rate:.1f} tok/s ({library}, threads: {engine.threads})"
        return engine.tokenizer.fingerprint, Finding("ok", "engine", text)
    finally:
        engine.close()
