"""Whether the device can train adapters, and which it uses."""

from __future__ import annotations

from pathlib import Path

from agent.adapt.hardware import ARCHITECTURES, LatencyTable, Shapes, choose_rank
from agent.adapt.recipe import Recipe
from agent.adapt.session import INSTALL, NO_ADAPTERS, adapters_folder, installed, memory_of, takes_adapters
from agent.adapt.store import AdapterStore
from agent.config import AgentConfig
from agent.doctor.finding import Finding
from models.fingerprint import fingerprint
from protocol.errors import BadModelFile, StoreError, TrainingError

_LENGTH = 256  # tokens of a usual lesson
_MB = 1 << 20
_UNMEASURED = LatencyTable("", "", 1, bfloat16=False)  # memory alone decides, and float32 takes the most


def check_training(config: AgentConfig, model: Path, available: int) -> Finding:
    """`available`: bytes of memory."""
    adapt = config.adapt
    if not adapt.enabled:
        return Finding("ok", "training", "off: adapt.enabled is false")
    if not takes_adapters(model):
        return Finding("warn", "training", NO_ADAPTERS, "or set adapt.enabled = false")
    try:
        used = _in_use(config, model)
        shapes = Shapes.of(model)
        if shapes.architecture not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            text = f"{used}; models of the architecture {shapes.architecture} cannot be trained"
            return Finding("warn", "training", text, f"choose a model of {known}, or set adapt.train = false")
        if not installed():
            remedy = INSTALL.partition(": ")[2]
            return Finding("warn" if adapt.train else "ok", "training", f"{used}; torch is not installed", remedy)
        memory = memory_of(adapt, available) / _MB
        rank = choose_rank(memory, adapt.step_s, _UNMEASURED, shapes, Recipe(), length=_LENGTH)
    except TrainingError as error:
        return Finding("warn", "training", f"{used}; {error}", "or set adapt.train = false")
    except (BadModelFile, StoreError) as error:
        return Finding("warn", "training", str(error), "see to device.folder, or set adapt.enabled = false")
    fits = f"rank {min(rank, adapt.rank or rank)} fits {memory:,.0f} MB"
    return Finding("ok", "training", f"{used}; {fits}, for lessons of {_LENGTH} tokens")


def _in_use(config: AgentConfig, model: Path) -> str:
    """Raises StoreError."""
    folder = adapters_folder(config)
    slots = AdapterStore(folder, fingerprint(model)).state().slots if folder.exists() else {}
    return "adapters in use: " + (", ".join(f"{slot} {id[:12]}" for slot, id in sorted(slots.items())) or "none")
